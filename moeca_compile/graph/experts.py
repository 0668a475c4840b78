"""One expert as a graph, and its evaluation for any rows of any experts.

A routed-experts node holds the body of ONE expert; the other experts are the same graph with other
parameters. The body is evaluated on rows sorted by expert: linears become one grouped linear,
per-expert vectors are gathered per row, everything else runs once on all rows and fuses.

    routed_experts(body, ids [T, K], rows ([T, D],), params (one entry per body parameter))
        -> [T, K, D]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..torch_compat import leaves, map_leaves
from .layout import Factor, Layout, RowSpace, Selection, free_layout, tags
from .pull import RowPuller
from .row_rules import Stop


@dataclass(frozen=True)
class PerExpert:
    """One value for each expert: a list of E tensors, or one stacked [E, ...] tensor."""

    tensors: tuple[Tensor, ...]

    @property
    def stacked(self) -> bool:
        return len(self.tensors) == 1

    def stack(self) -> Tensor:
        return self.tensors[0] if self.stacked else torch.stack(self.tensors)

    def each(self) -> tuple[Tensor, ...]:
        return tuple(self.tensors[0].unbind(0)) if self.stacked else self.tensors


@dataclass(frozen=True)
class SortedRows:
    """Rows grouped by expert. ends [E]: where each expert's rows end; experts [R]: row's expert;
    each: how many every expert has, where all are known to have the same number."""

    ends: Tensor
    experts: Tensor
    each: int | None = None


class ExpertRows(RowPuller):
    """Evaluates an expert body on sorted rows, parameters differing from expert to expert."""

    def __init__(
        self,
        body: GraphModule,
        rows: Sequence[Tensor],
        params: Sequence[PerExpert],
        groups: SortedRows,
    ):
        self.body = body
        self.groups = groups
        holes = [n for n in body.graph.nodes if n.op == "placeholder"]
        row_holes, param_holes = holes[: len(rows)], holes[len(rows) :]
        self._rows = dict(zip(row_holes, rows, strict=True))
        self._values: dict[Node, Any] = dict(zip(param_holes, params, strict=True))
        tokens = row_holes[0].meta["val"].shape[0]
        selection = Selection(
            RowSpace(1, int(tokens)), groups.experts, groups.experts.shape[0], per_sample=False
        )
        super().__init__(selection, self._evaluate, self._rows.__contains__)

    def run(self) -> Any:
        """The body's output rows [R, D] (fake or traced under the caller's mode)."""
        (result,) = cast(Sequence[Node], self.body.graph.output_node().args[0])
        shape = result.meta["val"].shape
        layout = ((Factor(int(shape[0]), "n"),), *free_layout(shape[1:]))
        return self.pull(result, layout)

    def gather(self, node: Node, layout: Layout) -> Any:
        if node in self._rows:
            if not layout or tags(layout[0]) != {"n"} or len(layout[0]) != 1:
                raise Stop("an expert moves its rows away from the first dim")
            return self._rows[node]
        raise Stop(self.stops.get(node, f"an expert mixes rows at {node.target}"))

    def operand(self, node: Node, own: Layout, result: Layout) -> Any:
        value = super().operand(node, own, result)
        if not isinstance(value, PerExpert):
            return value
        if not tags(result[0]):
            raise Stop("a per-expert parameter meets rows that are not in the first dim")
        per_row = value.stack().index_select(0, self.groups.experts)  # [R, ...]
        missing = len(result) - per_row.dim()
        if missing < 0:
            raise Stop("a per-expert parameter has as many dims as the rows it meets")
        return per_row.reshape([per_row.shape[0]] + [1] * missing + list(per_row.shape[1:]))

    def linear(self, node: Node, rows: Any, weight: Node, bias: Any) -> Any:
        w, b = self.full(weight), self.full(bias)
        if not isinstance(w, PerExpert):
            return super().linear(node, rows, weight, bias)
        shape = list(rows.shape)
        if len(shape) != 2:
            raise Stop("an expert's linear over rows with more than two dims")
        w, b = _same_form(w, b)
        return self.traced(node, lambda: self._product(rows, w.tensors, b.tensors if b else ()))

    def call(self, node: Node, args: Any, kwargs: Any) -> Any:
        products = (torch.ops.aten.matmul.default, torch.ops.aten.bmm.default)
        if node.target in products and isinstance(args[1], PerExpert):
            return self._product(args[0], [t.transpose(-1, -2) for t in args[1].tensors], ())
        if _has_per_expert((args, kwargs)):
            raise Stop(f"{node.target} of a per-expert parameter and rows")
        return super().call(node, args, kwargs)

    def _product(self, rows: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        """rows [R, I] by weights, E of [O, I] or one [E, O, I]; one batched product where every
        expert has as many rows as the others and no weight has to be copied for it."""
        each, bank = self.groups.each, weights[0]
        if each is None or len(weights) > 1 or bank.dim() != 3:
            return torch.ops.moeca.grouped_linear(
                rows, self.groups.ends, list(weights), list(biases)
            )
        out = torch.bmm(rows.reshape(-1, each, rows.shape[-1]), bank.transpose(1, 2))
        if biases:
            out = out + biases[0].unsqueeze(1)
        return out.reshape(-1, out.shape[-1])

    def _evaluate(self, node: Node) -> Any:
        """A value that does not depend on rows: once, or once for each expert."""
        if node in self._rows:
            raise Stop("an expert needs all of its rows at once")
        if node not in self._values:
            if node.op != "call_function":
                raise Stop(f"an expert reads {node.op} {node.target}")
            args = torch.fx.map_arg((node.args, node.kwargs), self._evaluate)
            self._values[node] = self.traced(node, lambda: _map_experts(node.target, *args))
        return self._values[node]


def _has_per_expert(tree: Any) -> bool:
    return any(isinstance(v, PerExpert) for v in leaves(tree)[0])


def _same_form(w: PerExpert, b: PerExpert | None) -> tuple[PerExpert, PerExpert | None]:
    """grouped_linear wants weights and biases both stacked or both listed."""
    if b is None or w.stacked == b.stacked:
        return w, b
    return PerExpert(w.each()), PerExpert(b.each())


def _map_experts(target: Any, args: Any, kwargs: Any) -> Any:
    found = [v for v in leaves((args, kwargs))[0] if isinstance(v, PerExpert)]
    if not found:
        return target(*args, **kwargs)
    results = []
    for values in zip(*(leaf.each() for leaf in found), strict=True):
        it = iter(values)
        one_args, one_kwargs = map_leaves(
            lambda v, it=it: next(it) if isinstance(v, PerExpert) else v, (args, kwargs)
        )
        results.append(target(*one_args, **one_kwargs))
    if isinstance(results[0], (tuple, list)):  # split, chunk, unbind of a parameter
        return [per_expert(part) for part in zip(*results, strict=True)]
    return PerExpert(tuple(results) if len(results) > 1 else (results[0].unsqueeze(0),))


def sort_branches(
    experts: Tensor, num_experts: int, computed: Tensor | None = None
) -> tuple[Tensor, SortedRows]:
    """Group branches by expert. experts [S]; `computed [S]` marks the branches that count.

    Returns (order [S], groups): `order` lists the branch numbers sorted by expert, those not
    computed last; the groups' rows are in that order.
    """
    key = experts if computed is None else torch.where(computed, experts, num_experts)
    # A radix sort takes a pass for each byte of its keys, on a GPU a kernel.
    key = key.to(torch.int16 if num_experts < torch.iinfo(torch.int16).max else torch.int32)
    ordered, order = torch.sort(key, stable=True)
    # On a CPU the search is no part of any kernel, so a cast in front would be a kernel of its own.
    sought = ordered if ordered.is_cpu else ordered.long()
    bounds = torch.arange(num_experts, device=key.device, dtype=sought.dtype)
    ends = torch.searchsorted(sought, bounds, right=True)
    return order, SortedRows(ends, ordered.long().clamp(max=num_experts - 1))


def inverse(order: Tensor) -> Tensor:
    """[S] with `inverse(order)[order[i]] == i`, of a permutation of S numbers; no second sort."""
    places = torch.arange(order.shape[0], device=order.device, dtype=order.dtype)
    return torch.zeros_like(order).scatter(0, order, places)


def num_experts_of(params: Sequence[Any]) -> int:
    """Experts of a routed node's params: tuples of E nodes, or one stacked node [E, ...]."""
    for entry in params:
        if isinstance(entry, (tuple, list)):
            return len(entry)
        return int(entry.meta["val"].shape[0] if isinstance(entry, Node) else entry.shape[0])
    raise ValueError("an expert without parameters")


def per_expert(entry: Any) -> PerExpert:
    """A params entry: E tensors, or one stacked tensor [E, ...]; a bank of one is stacked."""
    if isinstance(entry, (tuple, list)):
        tensors = list(entry)
        return PerExpert(tuple(tensors) if len(tensors) > 1 else (tensors[0].unsqueeze(0),))
    return PerExpert((entry,))


def routed_experts(
    body: GraphModule, ids: Tensor, rows: Sequence[Tensor], params: Sequence[Any]
) -> Tensor:
    """All branches: ids [T, K], rows each [T, ...] -> [T, K, D]. Semantics of the node.

    Raises Stop if the body is no row-wise function (refused when the node is made).
    """
    flat, top_k = ids.reshape(-1).long(), ids.shape[1]
    order, groups = sort_branches(flat, num_experts_of(params))
    token = torch.div(order, top_k, rounding_mode="floor")
    picked = [r.index_select(0, token) for r in rows]
    out = ExpertRows(body, picked, [per_expert(p) for p in params], groups).run()
    unsorted = out.index_select(0, inverse(order))
    return unsorted.reshape(*ids.shape, *out.shape[1:])
