"""Which graph input is the timestep, the sample, the conditioning, a weight.

L['t'] -> sin / cos by elementwise ops only        timestep   [], [1] or [B]
L['x'] with the shape of the output                sample     [B, C, H, W]
L['self']...                                       weight     its version is watched
every other input                                  conditioning: tells lanes apart
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import OptionsError, name_nearest
from ..graph.retrace import AtenGraph, Input
from ..graph.row_rules import VIEWS, pointwise, rule_for

WAVES = {torch.ops.aten.sin.default, torch.ops.aten.cos.default}
# Only used where structure finds no timestep or several: the names samplers pass it under.
USUAL_NAMES = (
    "timestep",
    "timesteps",
    "t",
    "time",
    "sigma",
    "sigmas",
    "noise_level",
    "noise_labels",
)


@dataclass(frozen=True)
class InputRoles:
    """Positions in the graph's tensor inputs. timestep, sample: None if not found."""

    timestep: int | None
    sample: int | None
    conditioning: tuple[int, ...]
    weights: tuple[int, ...]
    names: tuple[str, ...]


def find_roles(aten: AtenGraph, timestep: str | None) -> InputRoles:
    """Sort the inputs by role. Raises OptionsError if the named timestep is no input."""
    names = tuple(argument_name(i.source) for i in aten.inputs)
    user = [i for i, each in enumerate(aten.inputs) if not is_weight(each)]
    holes = aten.placeholders
    time = _named(names, user, timestep) if timestep else _find_timestep(holes, names, user)
    sample = _find_sample(aten, [i for i in user if i != time])
    rest = tuple(i for i in user if i not in (time, sample))
    weights = tuple(i for i in range(len(names)) if i not in user)
    return InputRoles(time, sample, rest, weights, tuple(names[i] for i in user))


def argument_name(source: str) -> str:
    """`L['kwargs']['timestep']` -> "timestep"; `L['x']` -> "x"."""
    quoted = re.findall(r"\['([^']+)'\]", source)
    return quoted[-1] if quoted else source


def is_weight(given: Input) -> bool:
    """Whether an input belongs to the model, so that it stays where it is from call to call."""
    return given.is_parameter or "L['self']" in given.source or "L['fn']" in given.source


def _named(names: tuple[str, ...], user: list[int], wanted: str) -> int:
    for i in user:
        if names[i] == wanted:
            return i
    given = [names[i] for i in user]
    raise OptionsError(
        f"option timestep={wanted!r}: expected a tensor argument of the model, found none of that "
        f"name{name_nearest(wanted, given)}; a Python number is no graph input, pass a tensor"
    )


def _find_timestep(holes: list[Node], names: tuple[str, ...], user: list[int]) -> int | None:
    small = [i for i in user if holes[i].meta["val"].dim() <= 1]
    waves = [i for i in small if _reaches_wave(holes[i])]
    if len(waves) == 1:
        return waves[0]
    for name in USUAL_NAMES:
        for i in waves or small:
            if names[i] == name:
                return i
    return None


def _reaches_wave(hole: Node) -> bool:
    """Whether the input gets into a sine or cosine through elementwise ops and changes of shape."""
    pending, seen = [hole], {hole}
    while pending:
        node = pending.pop()
        if node.target in WAVES:
            return True
        for user in node.users:
            through = user.target in VIEWS or rule_for(user.target) is pointwise
            if user not in seen and through:
                seen.add(user)
                pending.append(user)
    return False


def _find_sample(aten: AtenGraph, candidates: list[int]) -> int | None:
    """The input of the output's shape (channels may differ: learned variance)."""
    outputs = [n for n in aten.gm.graph.output_node().args[0] if isinstance(n, Node)]  # type: ignore[union-attr]
    if not outputs or not isinstance(outputs[0].meta["val"], Tensor):
        return None
    out = outputs[0].meta["val"]
    shapes = {i: aten.placeholders[i].meta["val"] for i in candidates}
    for i, value in shapes.items():
        if value.shape == out.shape and value.is_floating_point():
            return i
    for i, value in shapes.items():
        like = value.dim() == out.dim() >= 3 and value.shape[0] == out.shape[0]
        if like and value.shape[2:] == out.shape[2:] and value.is_floating_point():
            return i
    return None
