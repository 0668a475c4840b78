"""Sorted rows back in branch order, without the permutation.

Behind grouped products the rows are weighted in sorted order and then put back. With a routed node
the rows never leave branch order: the chain between is evaluated on them, and an index by the
sorting order is undone by not taking it.

    before:  out = (y * w[order, None])[argsort(order)]          y [T*K, D] sorted by expert
    after:   out = routed.reshape(T*K, D) * w[:, None]
    before:  out = zeros(T, D).index_add(0, order // K, y * w[order, None])
    after:   out = (routed.reshape(T*K, D) * w[:, None]).reshape(T, K, D).sum(1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .branches import Branches, NotOneExpert
from .dataflow import descendants
from .layout import Factor, Layout, RowSpace, Selection, free_layout, tags
from .lift_branches import trace_part
from .one_expert import Leaves
from .pull import RowPuller
from .routing_ids import IdsProbe, row_index
from .row_rules import rule_for, shape_of

aten = torch.ops.aten
ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
# Ops that read the shape of a value only.
SHAPED = {
    aten.zeros_like.default,
    aten.new_zeros.default,
    aten.empty_like.default,
    aten.new_empty.default,
}


@dataclass(frozen=True)
class Sorting:
    """Branches sorted by expert. order: the sorting permutation; probe: roles of index nodes."""

    branches: Branches
    order: Node
    experts: int
    probe: IdsProbe


@dataclass(frozen=True)
class Restored:
    """`part` computes the value of `node` from the routed rows [T, K, D] and `inputs`."""

    node: Node
    part: GraphModule
    inputs: tuple[Node, ...]


def restore_rows(root: Node, routed: Tensor, sorting: Sorting) -> list[Restored]:
    """All nodes that bring rows computed from `root` back, in graph order.

    routed: the fake value [T, K, D]. Raises NotOneExpert if sorted rows are used in any other way.
    """
    found: set[Node] = set()
    pending, seen = [root], {root}
    while pending:
        node = pending.pop()
        for user in node.users:
            if sorted_rows_of(user, sorting) is node:
                found.add(user)
            elif user.target in SHAPED:
                continue
            elif user.op == "output" or rule_for(user.target) is None or row_index(user):
                raise NotOneExpert("the branch outputs are used in sorted order", user)
            elif user not in seen:
                seen.add(user)
                pending.append(user)
    if not found:
        raise NotOneExpert("the branch outputs are never put back in branch order", root)
    order = [n for n in root.graph.nodes if n in found]
    return [_restored(n, root, routed, sorting) for n in order]


def sorted_rows_of(node: Node, sorting: Sorting) -> Node | None:
    """The sorted rows that `node` brings back to branch order, or sums for each token."""
    args: Any = node.args
    if (found := row_index(node)) is not None:
        return found[0] if sorting.probe.role(found[1]) == "position" else None
    if node.target is aten.index_put.default and len(args) == 3 and len(args[1]) == 1:
        index, rows, count = args[1][0], args[2], sorting.branches.count
    elif node.target is aten.index_copy.default and args[1] == 0:
        index, rows, count = args[2], args[3], sorting.branches.count
    elif _adds(node) and args[1] == 0 and node.kwargs.get("alpha", 1) == 1:
        index, rows, count = args[2], args[3], sorting.branches.tokens
    else:
        return None
    roles = {"sorted_token"} if _adds(node) else {"branch"}
    roles |= {"branch"} if sorting.branches.top_k == 1 else set()
    whole = shape_of(node) == [count, *shape_of(rows)[1:]]
    return rows if whole and sorting.probe.role(index) in roles else None


def _adds(node: Node) -> bool:
    return node.target is aten.index_add.default


class BranchOrder(RowPuller):
    """Pulls values of sorted rows as rows [T * K, ...] in branch order."""

    def __init__(self, root: Node, sorting: Sorting, leaves: Leaves):
        self._root, self._sorting, self._leaves = root, sorting, leaves
        self._sorted = descendants(root)
        count = sorting.branches.count
        selection = Selection(RowSpace(1, count), torch.empty(0), count, per_sample=False)
        super().__init__(selection, self._whole, lambda n: n is root or row_index(n) is not None)

    def rows(self, node: Node) -> Any:
        front = (Factor(self.selection.space.tokens, "n"),)
        return self.pull(node, (front, *free_layout(shape_of(node)[1:])))

    def gather(self, node: Node, layout: Layout) -> Any:
        if node in self.stops:
            where = "" if node in self._sorted else "meets sorted rows but is not in sorted order: "
            raise NotOneExpert(where + self.stops[node], node)
        if not tags(layout[0]):
            raise NotOneExpert("sorted rows that are not in the first dim", node)
        if node is self._root:
            routed = self._leaves.value("routed", node, [])
            return self.traced(node, lambda: routed.reshape(shape_of(node)))
        source, index = row_index(node) or (node, node)
        role, branches = self._sorting.probe.role(index), self._sorting.branches
        length = shape_of(source)[0]
        if role == "branch" and length == branches.count:
            return self._whole(source)
        if role != "sorted_token" or length != branches.tokens:
            raise NotOneExpert("rows taken by an index that is not the sorted order", node)
        value, times = self._whole(source), branches.top_k
        return self.traced(node, lambda: value.repeat_interleave(times, 0))

    def _whole(self, node: Node) -> Any:
        if node in self._sorted:
            raise NotOneExpert("the branch outputs are used in sorted order", node)
        return self._leaves.value("whole", node, shape_of(node))


def _restored(node: Node, root: Node, routed: Tensor, sorting: Sorting) -> Restored:
    rows = sorted_rows_of(node, sorting)
    assert rows is not None
    branches = sorting.branches

    def build(leaves: Leaves) -> Tensor:
        value = BranchOrder(root, sorting, leaves).rows(rows)
        if not _adds(node):
            return value
        value = value.reshape(branches.tokens, branches.top_k, *shape_of(rows)[1:]).sum(1)
        base: Any = node.args[0]
        return value if _is_zero(base) else leaves.value("whole", base, shape_of(base)) + value

    dry = Leaves(lambda n, _: routed if n is root else n.meta["val"])
    with torch.no_grad():
        build(dry)
    keys = [("routed", root), *(k for k in dry.holes if k[0] == "whole")]
    part = trace_part(
        lambda *holes: (build(Leaves(dry.make, dict(zip(keys, holes, strict=True)))),),
        [routed, *(dry.holes[k] for k in keys[1:])],
        root.meta["val"].fake_mode,
    )
    return Restored(node, part, tuple(n for _, n in keys[1:]))


def _is_zero(node: Node) -> bool:
    return node.target in ZEROS or (node.target is aten.full.default and bool(node.args[1] == 0))
