"""One expert's body, learned from a run over stacked parameters, as a function of its slices.

    for e in hits:                                       recorded for every expert that was hit
        h = act(F.linear(x[token], up[e]))       ->      template(rows, up_e, down_e):
        y = F.linear(h, down[e])                             h = act(F.linear(rows, up_e))
        out.index_add_(0, token, y * w[token, slot, None])   return F.linear(h, down_e)

The calls that depend on slices of one expert, and otherwise only on tensors with one row per row
given to it, are candidates for the end of a body: those with the fewest such inputs come first,
then later ones. A candidate has to repeat what every expert returned, for one row alone too;
whether it is the whole expert is decided by reproducing the dispatch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from ..torch_compat import map_leaves
from .expert_call import ExpertCall
from .expert_regions import Ref, Region, refs_in, sort_calls
from .op_record import Op
from .replay import close

_SCALARS = (bool, int, float, str, type(None), torch.dtype)
_MAX_ENTRIES = 3


class OtherExperts(ValueError):
    """The module is not what the template was learned from."""


@dataclass(frozen=True, eq=False)
class ExpertTemplate:
    """body(*rows, *slices, *shared) -> rows [R, D].

    stacks, shared: dotted names of parameters and buffers below the holder. settings: the holder's
    plain attributes, which the body has as constants. end: (inputs, number) of its last call.
    """

    body: GraphModule
    size: int
    stacks: tuple[str, ...]
    shared: tuple[str, ...]
    settings: tuple[tuple[str, Any], ...]
    end: tuple[int, int]
    functions: tuple[str, ...]

    def experts(self, holder: nn.Module) -> list[Callable[..., Tensor]]:
        """The experts of `holder` as functions of rows. Raises OtherExperts if it has changed."""
        if any(getattr(holder, name) != value for name, value in self.settings):
            raise OtherExperts("a setting the experts depend on has changed: capture again")
        if any(named(holder, name).shape[0] != self.size for name in self.stacks):
            raise OtherExperts(f"captured {self.size} experts, found others: capture again")
        shared = [named(holder, name) for name in self.shared]
        return [self._expert(holder, number, shared) for number in range(self.size)]

    def _expert(
        self, holder: nn.Module, number: int, shared: list[Tensor]
    ) -> Callable[..., Tensor]:
        def expert(*rows: Tensor) -> Tensor:
            slices = [named(holder, name)[number] for name in self.stacks]
            return self.body(*rows, *slices, *shared)

        return expert


def named(holder: nn.Module, name: str) -> Any:
    """The parameter or buffer at a dotted name."""
    value: Any = holder
    for part in name.split("."):
        value = getattr(value, part)
    return value


@dataclass(frozen=True)
class Learned:
    """A template and the calls of the experts it was learned from."""

    template: ExpertTemplate
    calls: tuple[ExpertCall, ...]


def learn(
    ops: list[Op], holder: nn.Module, stacks: dict[str, Tensor], size: int
) -> Iterator[Learned]:
    """Bodies that repeat what every expert returned while `ops` were recorded, likeliest first."""
    regions = sort_calls(holder, stacks, ops)
    if not regions:
        return
    chief = max(regions.values(), key=lambda region: region.rows)
    for end in _ends(chief):
        learned = learn_end(regions, chief, holder, size, end)
        if learned is not None:
            yield learned


def learn_same(
    ops: list[Op], holder: nn.Module, stacks: dict[str, Tensor], template: ExpertTemplate
) -> Learned | None:
    """The body with the end of `template` in another run, that of other dtypes."""
    regions = sort_calls(holder, stacks, ops)
    if not regions:
        return None
    chief = max(regions.values(), key=lambda region: region.rows)
    found = learn_end(regions, chief, holder, template.size, template.end, strict=False)
    same = found is not None and found.template.functions == template.functions
    return found if same else None


def learn_end(
    regions: dict[int, Region],
    chief: Region,
    holder: nn.Module,
    size: int,
    end: tuple[int, int],
    strict: bool = True,
) -> Learned | None:
    """The template that ends at one call, if every expert did the same calls with its values."""
    if end[1] >= len(chief.ops):
        return None
    template = _build(chief, holder, size, end)
    if template is None:
        return None
    calls = []
    for expert, region in sorted(regions.items()):
        inputs = _entries_of(template, chief, region, end[1])
        if inputs is None:
            return None
        output = region.ops[end[1]].values
        if strict and not _repeats(template, holder, expert, inputs, output):
            return None
        calls.append(ExpertCall(expert, tuple(inputs), {}, output))
    return Learned(template, tuple(calls))


def _repeats(
    template: ExpertTemplate, holder: nn.Module, expert: int, rows: list[Tensor], output: Tensor
) -> bool:
    run = template.experts(holder)[expert]
    try:
        return close(run(*rows), output) and close(run(*(r[:1] for r in rows)), output[:1])
    except Exception:  # sizes of the recorded run are in the body, or a wrong guess: any failure
        return False


def _ends(region: Region) -> list[tuple[int, int]]:
    """(inputs, call) of the calls that may end a body, likeliest first."""
    found = []
    for number, op in enumerate(region.ops):
        value = op.values
        if isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] == region.rows:
            inputs = len({r.number for r in _needed(region, number) if r.kind == "entry"})
            if 0 < inputs <= _MAX_ENTRIES:
                found.append((inputs, number))
    return sorted(found, key=lambda end: (end[0], -end[1]))


def _needed(region: Region, end: int) -> list[Ref]:
    """What the calls up to `end` that it depends on read."""
    pending, seen, found = [end], set[int](), []
    while pending:
        number = pending.pop()
        if number in seen:
            continue
        seen.add(number)
        for ref in refs_in(region.wired[number]):
            found.append(ref)
            if ref.kind == "call":
                pending.append(ref.number)
    return found


def _build(
    region: Region, holder: nn.Module, size: int, end: tuple[int, int]
) -> ExpertTemplate | None:
    refs = _needed(region, end[1])
    stacks = tuple(sorted({r.name for r in refs if r.kind == "slice"}))
    shared = tuple(sorted({r.name for r in refs if r.kind == "shared"}))
    entries = sorted({r.number for r in refs if r.kind == "entry"})
    graph, holes = Graph(), dict[tuple[str, Any], Node]()
    for kind, keys in (("entry", entries), ("slice", stacks), ("shared", shared)):
        for index, key in enumerate(keys):
            holes[kind, key] = graph.placeholder(f"{kind}_{index}")
    calls = sorted({r.number for r in refs if r.kind == "call"} | {end[1]})
    made: dict[int, Node] = {}

    def node_of(leaf: Any) -> Any:
        if not isinstance(leaf, Ref):
            return leaf
        if leaf.kind != "call":
            return holes[leaf.kind, leaf.number if leaf.kind == "entry" else leaf.name]
        value = made[leaf.number]
        several = isinstance(region.ops[leaf.number].result, (tuple, list))
        return graph.call_function(operator.getitem, (value, leaf.leaf)) if several else value

    for number in calls:
        args, kwargs = map_leaves(node_of, region.wired[number])
        made[number] = _call(graph, region.ops[number].function, args, kwargs)
    graph.output(made[end[1]])
    functions = tuple(region.ops[n].function.__name__ for n in calls)
    body = GraphModule(nn.Module(), graph)
    return ExpertTemplate(body, size, stacks, shared, _settings(holder), end, functions)


def _call(graph: Graph, function: Any, args: Any, kwargs: Any) -> Node:
    """The call as Python spells it, so that it traces like the model's own code."""
    name = function.__name__
    if name == "__get__":
        return graph.call_function(getattr, (args[0], cast(Any, function).__self__.__name__))
    if getattr(Tensor, name, None) is not function:
        return graph.call_function(function, args, kwargs)
    plain = name.strip("_")
    if name.startswith("__") and name.startswith("__r") and hasattr(operator, plain[1:]):
        return graph.call_function(getattr(operator, plain[1:]), args[::-1], kwargs)
    if name.startswith("__") and hasattr(operator, name):
        return graph.call_function(getattr(operator, name), args, kwargs)
    return graph.call_method(name, args, kwargs)


def _settings(holder: nn.Module) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (name, value)
        for name, value in vars(holder).items()
        if isinstance(value, _SCALARS) and not name.startswith("_")
    )


def _entries_of(
    template: ExpertTemplate, chief: Region, region: Region, end: int
) -> list[Tensor] | None:
    """The row inputs of another expert, if its calls up to `end` are those of the template."""
    if region is not chief and (
        len(region.ops) <= end
        or [op.function for op in region.ops[: end + 1]]
        != [op.function for op in chief.ops[: end + 1]]
        or region.wired[: end + 1] != chief.wired[: end + 1]
    ):
        return None
    numbers = sorted({r.number for r in _needed(chief, end) if r.kind == "entry"})
    return [region.values[number] for number in numbers]
