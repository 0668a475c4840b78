"""Why a graph is not cached, in words for the user; every function looks and changes nothing.

unsupported(inputs) -> "gradients are on: call the model under torch.no_grad() or ..."
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from .capture import RootState
from .options import Options
from .pipeline import Analysis
from .runtime.inputs import USUAL_NAMES, argument_name
from .torch_compat import placeholder_source

GRADIENTS = "gradients are on: call the model under torch.no_grad() or torch.inference_mode()"
NO_LAYER = "no mixture-of-experts layer in this graph"
NAME_ONE = "name a policy, e.g. policy='auto', to cache a dense denoiser"
READS = ("item", torch.ops.aten.item.default)


def unsupported(inputs: Sequence[Any]) -> str:
    """Why this graph runs as plain Inductor whatever is in it; empty if nothing stands against."""
    if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in inputs):
        return GRADIENTS
    if any(isinstance(v, Tensor) and 0 in v.shape for v in inputs):
        return "an empty input"
    devices = {v.device.type for v in inputs if isinstance(v, Tensor)} - {"cpu", "cuda"}
    if devices:
        return f"device {sorted(devices)[0]} is not supported"
    return ""


def changing_number(gm: GraphModule, inputs: Sequence[Any], options: Options) -> str:
    """Why no step can be cached if a Python number changes from call to call; empty if none does.

    Dynamo passes a number it has seen change as a graph input: an int as it is, a float as a
    tensor without dimensions that the graph reads. An entry for every timestep is no use.
    """
    holes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for hole, value in zip(holes, inputs):
        source = placeholder_source(hole)
        name, is_size = argument_name(source), ".size()" in source or ".stride()" in source
        number = isinstance(value, (int, torch.SymInt)) and not is_size
        named = number and name in (*USUAL_NAMES, options.timestep)
        if named or any(user.target in READS for user in hole.users):
            return f"argument {name!r} is a Python number that changes: pass a tensor"
    return ""


def why_no_layer(analysis: Analysis) -> str:
    """What stands against the first layer that looked like one; NO_LAYER if none did."""
    missed = [m for m in analysis.missed if m.kind == "moe"]
    if missed:
        return f"{missed[0].name}: {missed[0].reason}"
    return NO_LAYER


def wrong_mode(root: nn.Module) -> str:
    """Why the dispatch of a model with expert banks is not replaced in this call."""
    if root.training:
        return "the model is in training mode: call model.eval()"
    return GRADIENTS if torch.is_grad_enabled() else ""


def why_refused(state: RootState) -> str:
    for module in state.report.modules if state.report is not None else ():
        if not module.accepted:
            return f"{module.path}: {module.reason} ({module.location})"
    return state.reason


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
