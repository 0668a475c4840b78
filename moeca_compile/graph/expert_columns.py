"""E subgraphs that are one graph with other parameters: aligned node by node, one kept as the body.

y_0 = down_0(act(up_0(r_0)))            columns  up_0 -> [up_0, up_1]   down_0 -> [down_0, ..]
y_1 = down_1(act(up_1(r_1)))            body     down(act(up(rows)))    params up, down
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

AreRows = Callable[[list[Node]], bool]


class NotIsomorphic(Exception):
    """Two experts are not the same graph; `node` is where they part."""

    def __init__(self, reason: str, node: Node):
        super().__init__(reason)
        self.reason = reason
        self.node = node


def align_experts(outs: list[Node], are_rows: AreRows) -> dict[Node, list[Node]]:
    """Each node of expert 0 -> the corresponding node of every expert.

    are_rows: whether these nodes, one of each expert, are what the experts are called on; the
    alignment ends there. Raises NotIsomorphic.
    """
    columns: dict[Node, list[Node]] = {}

    def visit(nodes: list[Node]) -> None:
        first = nodes[0]
        if first in columns:
            if columns[first] != nodes:
                raise NotIsomorphic("experts share values in different ways", nodes[0])
            return
        columns[first] = nodes
        if are_rows(nodes):
            return
        if is_parameter(first, nodes):
            return
        for other in nodes[1:]:
            if other.op != first.op or other.target != first.target:
                raise NotIsomorphic(f"experts differ: {first.target} against {other.target}", other)
        compare([n.args for n in nodes], first)
        compare([n.kwargs for n in nodes], first)

    def compare(trees: list[Any], at: Node) -> None:
        first = trees[0]
        if isinstance(first, Node):
            if not all(isinstance(t, Node) for t in trees):
                raise NotIsomorphic("experts differ in an argument", at)
            visit(trees)
        elif isinstance(first, (tuple, list)):
            if any(len(t) != len(first) for t in trees):
                raise NotIsomorphic("experts differ in an argument list", at)
            for parts in zip(*trees, strict=True):
                compare(list(parts), at)
        elif isinstance(first, dict):
            compare([tuple(sorted(t.items())) for t in trees], at)
        elif any(t != first for t in trees):
            raise NotIsomorphic(f"experts differ in a constant: {first}", at)

    visit(outs)
    return columns


def is_parameter(node: Node, column: list[Node]) -> bool:
    """Whether a node that is no rows is given from outside the body: to each expert or to all."""
    held = node.op in ("placeholder", "get_attr") or all(n is node for n in column)
    return held or stack_of(column) is not None


def stack_of(column: list[Node]) -> Node | None:
    """The one tensor [E, ...] of which column entry e is slice e, if there is one."""
    stack = column[0].args[0] if column[0].target is torch.ops.aten.select.int else None
    if not isinstance(stack, Node) or stack.op not in ("placeholder", "get_attr"):
        return None
    slices = all(
        node.target is torch.ops.aten.select.int and node.args == (stack, 0, number)
        for number, node in enumerate(column)
    )
    return stack if slices and stack.meta["val"].shape[0] == len(column) else None
