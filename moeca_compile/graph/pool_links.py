"""Experts that pick tokens one after another and add to the same rows: a chain, one link an expert.

gate, index = topk(scores_e [T], count_e)
y_e = index_put(y_before, [index], y_before[index] + gate[:, None] * expert_e(x[index]))
y_e = index_add(y_before, 0, index, ...)                         the same in one op
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .choice_dispatch import Top, find_top
from .routing_ids import CASTS, row_index
from .rule_base import argument

aten = torch.ops.aten
ADDS = {aten.add.Tensor}


@dataclass(frozen=True)
class Link:
    """`node` is `before` with `added` [u, D] added to the rows that `top` picked."""

    node: Node
    before: Node
    top: Top
    added: Node

    @property
    def scores(self) -> Node:
        return self.top.node.args[0]  # type: ignore[return-value]

    @property
    def gates(self) -> Node | None:
        """The picked scores, sorted as the picks are."""
        parts = [n for n in self.top.node.users if n.args[1:2] == (0,)]
        return parts[0] if parts else None


def find_chains(gm: GraphModule) -> list[list[Link]]:
    """All chains of at least two links, in graph order, each from its first link on."""
    links: dict[Node, Link] = {}
    for node in gm.graph.nodes:
        if (link := _link(node)) is not None:
            links[node] = link
    inner = {link.before for link in links.values()}
    chains = []
    for last in [n for n in links if n not in inner]:
        chain = [links[last]]
        while chain[0].before in links:
            chain.insert(0, links[chain[0].before])
        if len(chain) > 1:
            chains.append(chain)
    return chains


def _link(node: Node) -> Link | None:
    args: Any = node.args
    if node.target is aten.index_add.default and args[1] == 0:
        before, index, added = args[0], args[2], args[3]
        if argument(node, 4, "alpha", 1) != 1:
            return None
    elif node.target is aten.index_put.default and len(args[1]) == 1:
        before, index, added = args[0], args[1][0], args[2]
        if not argument(node, 3, "accumulate", False):
            added = _read_and_added(added, before, index)
    else:
        return None
    if added is None or not isinstance(index, Node) or not index.all_input_nodes:
        return None
    top = find_top(index.all_input_nodes[0])
    flat = top is not None and top.picks is index and index.meta["val"].dim() == 1
    return Link(node, before, top, added) if flat else None  # type: ignore[arg-type]


def _read_and_added(value: Node, before: Node, index: Node) -> Node | None:
    """What is added to before[index], if `value` is that sum."""
    while value.target in CASTS:
        value = value.args[0]  # type: ignore[assignment]
    if value.target not in ADDS or argument(value, 2, "alpha", 1) != 1:
        return None
    for mine, other in (value.args[:2], value.args[1::-1]):
        if isinstance(mine, Node) and row_index(mine) == (before, index):
            return other if isinstance(other, Node) else None
    return None
