"""What a graph does again and again is traced once; for the other times its trace is copied.

    Dynamo graph        embed | block | block | block | head
    ATen graph          traced  traced  copied  copied  traced      on their own weights and values

Tracing costs milliseconds an operation, and a denoiser is a dozen blocks or more that do the same.
Which nodes those are is found as for the kernels (graph/repeats.py), where all sizes are constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ..torch_compat import Trace, leaves
from .constant_reads import WithConstants
from .functional import mutates
from .repeats import find_groups

ENTER = torch.amp.autocast_mode._enter_autocast
EXIT = torch.amp.autocast_mode._exit_autocast


class Untransferable(Exception):
    """The trace of one run cannot stand for that of another one."""


@dataclass(frozen=True)
class Traced:
    """A run that was traced. nodes: (number in the run, node) of what that added; operands: values;
    read: what their tensors stood for; moved: what they did afterwards, where an op that changes
    nothing handed them on; results: values; stood: what those stood for."""

    nodes: tuple[tuple[int, Node], ...]
    operands: tuple[Any, ...]
    read: tuple[Node | None, ...]
    moved: tuple[Node | None, ...]
    results: tuple[Any, ...]
    stood: tuple[Node | None, ...]


class RetraceRepeats(WithConstants):
    """`WithConstants` to be run under `make_fx`. copied: number of runs that were not traced."""

    def __init__(self, gm: GraphModule, known: dict[Node, Any]) -> None:
        super().__init__(gm, known)
        self.copied = 0
        self._source = gm.graph

    def run(self, *args: Any) -> Any:  # type: ignore[override]
        """The outputs of the graph on `args`."""
        groups, trace = find_groups(self._source), Trace.current()
        if groups is None or trace is None:
            return super().run(*args)
        self.args_iter = iter(args)
        runs = {node for group in groups for run in group.runs for node in run}
        for node in self._source.nodes:
            if node not in runs and node.op != "output":
                self.env[node] = self.run_node(node)
        for group in groups:
            first: Traced | None = None
            for run, operands in zip(group.runs, group.operands, strict=True):
                values = tuple(self.env[n] for n in operands)
                results = [run[i] for i in group.results]
                try:
                    if first is None:
                        raise Untransferable
                    self.env.update(zip(results, _copy(trace, first, run, values), strict=True))
                    self.copied += 1
                except Untransferable:
                    read, nodes = _standing_for(trace, values), self._trace(trace, run)
                    made = tuple(self.env[n] for n in results)
                    moved, stood = (_standing_for(trace, v) for v in (values, made))
                    first = Traced(nodes, values, read, moved, made, stood)
        return self.run_node(self._source.output_node())

    def _trace(self, trace: Trace, run: Sequence[Node]) -> tuple[tuple[int, Node], ...]:
        added: list[tuple[int, Node]] = []
        for number, node in enumerate(run):
            last = trace.last
            self.env[node] = self.run_node(node)
            added += [(number, each) for each in trace.behind(last)]
        return tuple(added)


def _copy(trace: Trace, first: Traced, run: Sequence[Node], values: tuple[Any, ...]) -> list[Any]:
    """Append what tracing `run` on `values` would; its results. Raises Untransferable, before
    anything is added."""
    (old, old_spec), (new, new_spec) = leaves(first.operands), leaves(values)
    if old_spec != new_spec:
        raise Untransferable
    node_for: dict[Node, Node] = {}
    value_for: dict[Node, Tensor] = {}
    stand_now = _standing_for(trace, values)
    for before, now, one, other in zip(old, new, first.read, stand_now, strict=True):
        if one is None or other is None:
            if one is not other or type(before) is not type(now) or before is not now:
                raise Untransferable
        elif node_for.setdefault(one, other) is not other:
            raise Untransferable
        else:
            value_for[one] = now
    inside = {node for _, node in first.nodes}
    outside = {n for node in inside for n in node.all_input_nodes} - inside
    if any(not _can_be_copied(node) for node in inside) or not outside <= node_for.keys():
        raise Untransferable
    if not {*first.stood} <= inside | node_for.keys():
        raise Untransferable

    for number, node in first.nodes:
        made = node_for[node] = trace.copy(node, node_for.__getitem__)
        source = run[number].meta
        made.meta.update({k: source[k] for k in made.meta.keys() & source.keys()})
    for value, one, node in zip(new, first.read, first.moved, strict=True):
        if node is not None and node is not one:
            trace.take(value, node_for[node])
            value_for[node] = value
    for node, value in zip(first.stood, first.results, strict=True):
        if node is not None and node not in value_for:
            value_for[node] = trace.stand_for(node_for[node], value)
    return [value_for[node] for node in first.stood if node is not None]


def _standing_for(trace: Trace, values: tuple[Any, ...]) -> tuple[Node | None, ...]:
    return tuple(trace.node(v) if isinstance(v, Tensor) else None for v in leaves(values)[0])


def _can_be_copied(node: Node) -> bool:
    """Whether it is an op that neither writes nor has a size that the data decides."""
    op = isinstance(node.target, OpOverload) and not mutates(node)
    known = op or node.target in (getitem, ENTER, EXIT)
    return known and "unbacked_bindings" not in node.meta
