"""Sort, grouped products, inverse sort -> one routed-experts node in branch order.

Grouped dispatch sorts the branches by expert, multiplies each group by its expert's matrix and
puts the rows back. The routed node does all three, so the permutations cancel.

    before:  order = argsort(ids [T*K]);  ends = cumsum(histc(ids[order], E), int32)
             h = _grouped_mm(x[order // K] [T*K, D], W1 [E, D, F], ends)
             y = _grouped_mm(act(h) [T*K, F], W2 [E, F, D], ends)
             (y * w[order, None])[argsort(order)].view(T, K, D).sum(1)
    after:   y = routed_experts(body, ids [T, K], (x,), (W1, W2)).reshape(T*K, D)
             (y * w[:, None]).view(T, K, D).sum(1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..graph.branch_order import Restored, Sorting, restore_rows
from ..graph.branches import Branches, NotOneExpert
from ..graph.dataflow import ancestors
from ..graph.layout import Layout, free_layout, tags
from ..graph.lift_branches import Lifted, body_end, fold_branches, inline, insert_routed
from ..graph.one_expert import Leaves, OneExpert
from ..graph.region import NoMatch, module_path
from ..graph.routing_ids import IdsProbe, branches_of, row_index
from ..graph.row_rules import shape_of
from ..graph.rule_base import argument
from ..graph.view_rules import transposed_of
from .base import PassReport
from .normalize_gathered import below, parametric_nodes

aten = torch.ops.aten
SORTS = {aten.argsort.default, aten.argsort.stable, aten.sort.default, aten.sort.stable}


@dataclass(frozen=True)
class GroupedMatch:
    """The routed node to be, and the nodes that bring its rows back to branch order."""

    lifted: Lifted
    restored: tuple[Restored, ...]


@dataclass(frozen=True)
class NormalizeGrouped:
    """Replace grouped products over sorted branches, or say why not."""

    name: str = "normalize_grouped"

    def run(self, gm: GraphModule) -> PassReport:
        missed, changed = [], 0
        left = [n for n in gm.graph.nodes if n.target is aten._grouped_mm.default]
        while left:
            last = left.pop()
            found = match_grouped(gm, last)
            if isinstance(found, NoMatch):
                missed.append(found)
                offsets = last.args[2:3]
                left = [p for p in left if p.args[2:3] != offsets]
                continue
            left = [p for p in left if p not in found.lifted.products]
            replace_grouped(gm, found)
            changed += 1
        if changed:
            gm.graph.eliminate_dead_code()
            gm.graph.lint()
            gm.recompile()
        return PassReport(self.name, changed, tuple(missed))


def match_grouped(gm: GraphModule, product: Node) -> GroupedMatch | NoMatch:
    """The experts whose last product is `product`; the graph is not changed."""
    try:
        sorting = find_sorting(product)
        indexed = {n: found for n in gm.graph.nodes if (found := row_index(n)) is not None}
        role = sorting.probe.role
        gathers = {n: bank for n, (bank, i) in indexed.items() if role(i) == "sorted_ids"}
        parametric = parametric_nodes(gm, gathers)
        sources = [n for n, (_, i) in indexed.items() if role(i) in ("branch", "sorted_token")]
        inside = below(gm, [*parametric, *sources], sorting.branches)

        def make_puller(leaves: Leaves) -> OneExpert:
            return SortedExpert(sorting, leaves, parametric, inside)

        root = body_end(product, sorting.branches, make_puller)
        lifted = fold_branches(root, sorting.branches, make_puller, parametric)
        return GroupedMatch(lifted, tuple(restore_rows(root, lifted.value, sorting)))
    except NotOneExpert as error:
        return NoMatch("moe", module_path(product), error.reason, error.node)


def find_sorting(product: Node) -> Sorting:
    """The sort behind a grouped product, verified. Raises NotOneExpert."""
    args: Any = product.args
    rows, weight, offsets = args[0], args[1], argument(product, 2, "offs")
    if len(shape_of(rows)) != 2 or len(shape_of(weight)) != 3 or not isinstance(offsets, Node):
        raise NotOneExpert("a grouped product of other than [R, I] rows and [E, I, O]", product)
    experts, count = shape_of(weight)[0], shape_of(rows)[0]
    above = ancestors([rows])
    sorts = [n for n in above if n.target in SORTS and shape_of(n.args[0]) == [count]]
    position = {n: i for i, n in enumerate(product.graph.nodes)}
    reason, at = "no sort of T * K routing ids leads to its rows", product
    for sort in sorted(sorts, key=lambda n: -position[n]):
        (key,) = sort.all_input_nodes
        branches = branches_of(key)
        order = _permutation(sort)
        if not isinstance(branches, Branches) or order is None:
            continue
        probe = IdsProbe(branches, experts, order)
        if not probe.sorts():
            reason, at = "its rows are not sorted by ascending expert", sort
        elif probe.role(offsets) != "ends":
            reason, at = "its offsets are not the cumulative counts of the sorted ids", offsets
        else:
            return Sorting(branches, order, experts, probe)
    raise NotOneExpert(reason, at)


def _permutation(sort: Node) -> Node | None:
    if isinstance(sort.meta["val"], Tensor):
        return sort
    parts = [n for n in sort.users if getattr(n.target, "__name__", "") == "getitem"]
    return next((n for n in parts if n.args[1] == 1), None)


class SortedExpert(OneExpert):
    """Pulls values of sorted branches; behind an index by the order, of branches as numbered."""

    def __init__(
        self,
        sorting: Sorting,
        leaves: Leaves,
        parametric: dict[Node, Node | None],
        inside: set[Node],
    ):
        super().__init__(sorting.branches, sorting.probe, leaves, parametric, inside)
        self._unsorted = OneExpert(sorting.branches, sorting.probe, leaves, {}, inside)

    def gather(self, node: Node, layout: Layout) -> Any:
        if node in self.stops or node in self.parametric:
            return super().gather(node, layout)
        if node.target is aten._grouped_mm.default:
            return self.grouped_product(node, layout)
        if (found := row_index(node)) is None:
            raise NotOneExpert("not a row of the sorted branches", node)
        source, index = found
        role, length = self.probe.role(index), shape_of(source)[0]
        if tags(layout[:1]) != self.branches.tags or len(shape_of(index)) != 1:
            return self.by_rule(node, layout)
        if role == "branch" and length == self.branches.count:
            return self._unsorted.pull(source, layout)
        if role == "sorted_token" and length == self.branches.tokens:
            return self.token_rows(source, (self.branches.token_dim(), *layout[1:]), layout)
        raise NotOneExpert("rows taken by an index that is not the sorted order", node)

    def grouped_product(self, node: Node, layout: Layout) -> Any:
        """_grouped_mm(rows, W [E, I, O], offsets) -> linear or matmul with one expert's matrix."""
        self.products.add(node)
        args: Any = node.args
        rows_node, weight = args[:2]
        offsets = argument(node, 2, "offs")
        if argument(node, 3, "bias") is not None:
            raise NotOneExpert("a grouped product with a bias", node)
        if not isinstance(offsets, Node) or self.probe.role(offsets) != "ends":
            raise NotOneExpert("its offsets are not the cumulative counts of the sorted ids", node)
        rows = self.matrix(rows_node, (*layout[:1], *free_layout(shape_of(rows_node)[1:])))
        bank = transposed_of(weight)
        stored = bank or weight
        w = self.leaves.value("param", stored, shape_of(stored)[1:])
        out = self.traced(node, lambda: (aten.linear if bank else aten.matmul)(rows, w))
        dtype = node.meta["val"].dtype
        return out if out.dtype == dtype else self.traced(node, lambda: out.to(dtype))

    def _is_special(self, node: Node) -> bool:
        is_product = node.target is aten._grouped_mm.default
        return node in self.parametric or is_product or row_index(node) is not None


def replace_grouped(gm: GraphModule, match: GroupedMatch) -> None:
    """Put the routed node before the first node that restores branch order, and replace these."""
    routed = insert_routed(gm, match.lifted, match.restored[0].node)
    for restored in match.restored:
        with gm.graph.inserting_before(restored.node):
            (out,) = inline(gm, restored.part, [routed, *restored.inputs])
        restored.node.replace_all_uses_with(out)
