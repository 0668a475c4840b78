"""What is measured: a model, and the calls of one generation, the same for every candidate.

load("small", Sizes(batch=8, steps=50))        a configuration of networks.py, by name
load("model.py:factory", Sizes(steps=50))      the user's own; cli/load.py says what it returns

A factory that returns one call's arguments gets a trajectory made of it: the sample drifts, the
timestep falls. One that returns an object with `generate()` is followed through it once. An
attribute `peers` of the model or the object, {name: function(model) -> callable}, adds candidates.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..cli.load import Subject, load_subject
from ..errors import MoecaError, name_nearest
from ..runtime.inputs import USUAL_NAMES
from ..torch_compat import map_leaves
from .networks import SIZES, build, call

Call = tuple[tuple[Any, ...], dict[str, Any]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DRIFT = 0.05  # of a unit-variance sample from one call to the next


@dataclass(frozen=True)
class Sizes:
    """What the command line says of a workload. None: as the model comes."""

    batch: int = 8
    steps: int = 8
    depth: int | None = None
    dtype: str | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Workload:
    """calls: of one generation. peers: other ways to cache this model, made when measured."""

    model: nn.Module
    calls: list[Call]
    peers: dict[str, Callable[[nn.Module], Callable[..., Any]]] = field(default_factory=dict)


def load(spec: str, sizes: Sizes) -> Workload:
    """Build it, in eval mode without gradients. Raises MoecaError or click.UsageError."""
    made = _from_factory(spec, sizes) if ":" in spec else _from_name(spec, sizes)
    dtype = DTYPES[sizes.dtype] if sizes.dtype else None
    model = made.model.eval().requires_grad_(False).to(device=sizes.device, dtype=dtype)

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        # timesteps keep their precision: 0.98 and 0.96 are one number in bfloat16 all too soon
        cast = leaf.is_floating_point() and leaf.dim() > 1 and dtype is not None
        return leaf.to(device=sizes.device, dtype=dtype if cast else leaf.dtype)

    return dataclasses.replace(made, model=model, calls=map_leaves(place, made.calls))


def _from_name(name: str, sizes: Sizes) -> Workload:
    if name not in SIZES:
        nearest = name_nearest(name, SIZES)
        raise MoecaError(f"no configuration {name!r}{nearest}; or give FILE.py:factory")
    size = SIZES[name]
    if sizes.depth is not None:
        size = dataclasses.replace(size, depth=sizes.depth)
    try:
        first = call(size, sizes.batch)
    except ValueError as error:
        raise MoecaError(str(error)) from error
    return Workload(build(size), trajectory((first, {}), first[0], first[1], sizes.steps))


def _from_factory(spec: str, sizes: Sizes) -> Workload:
    subject = load_subject(spec)
    peers = getattr(subject.generator, "peers", None) or getattr(subject.model, "peers", {})
    if subject.generator is not None:
        return Workload(subject.model, _followed(subject), peers)
    first = (subject.args, subject.kwargs)
    sample, timestep = _roles(subject.model, first)
    return Workload(subject.model, trajectory(first, sample, timestep, sizes.steps), peers)


def _followed(subject: Subject) -> list[Call]:
    """Arguments of every call that `generate()` makes, eager."""
    calls: list[Call] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(map_leaves(_copied, (args, kwargs)))
        return subject.model(*args, **kwargs)

    subject.generate(watched)
    return calls


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf  # samplers may write in place


def trajectory(first: Call, sample: Tensor, timestep: Tensor, steps: int) -> list[Call]:
    """`steps` calls like `first`: `sample` drifts, `timestep` falls from where it is."""
    generator = torch.Generator().manual_seed(0)
    calls: list[Call] = []
    now, falls = sample, 1 / max(steps + 1, 50)
    for index in range(steps):
        time = (timestep * (1 - falls * index)).to(timestep.dtype)
        new = {id(sample): now, id(timestep): time}
        calls.append(map_leaves(lambda leaf, new=new: new.get(id(leaf), leaf), first))
        noise = torch.randn(sample.shape, generator=generator).to(sample)
        now = now + DRIFT * noise
    return calls


def _roles(model: nn.Module, first: Call) -> tuple[Tensor, Tensor]:
    """Sample and timestep among the arguments. Raises MoecaError naming what is missing."""
    given = inspect.signature(model.forward).bind(*first[0], **first[1]).arguments
    named = {**given, **next((v for v in given.values() if isinstance(v, dict)), {})}
    tensors = {k: v for k, v in named.items() if isinstance(v, Tensor)}
    timestep = next((tensors[n] for n in USUAL_NAMES if n in tensors), None)
    floats = [v for v in tensors.values() if v.is_floating_point() and v.dim() > 2]
    if timestep is None or not floats:
        what = "sample (a float tensor of three or more dims)" if timestep is not None else (
            f"timestep (a tensor argument called one of {', '.join(USUAL_NAMES)})"
        )  # fmt: skip
        raise MoecaError(
            f"found no {what} among the arguments {list(named)}: let the factory return an object "
            "with .model and .generate()"
        )
    return floats[0], timestep
