"""Reachability in an FX graph, and which ops are worth saving."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

from .chosen import chosen_experts
from .experts import routed_experts

aten = torch.ops.aten
HEAVY = {
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.einsum.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.scaled_dot_product_attention.default,
    torch.ops.moeca.grouped_linear.default,
    torch.ops.moeca.grouped_experts.default,
    torch.ops.moeca.select_experts.default,
    routed_experts,
    chosen_experts,
}


def is_heavy(node: Node) -> bool:
    """Matrix products: the ops whose cost a row cache saves."""
    return node.target in HEAVY


def ancestors(
    seeds: Iterable[Node], *, stop: set[Node] | frozenset[Node] = frozenset()
) -> set[Node]:
    """Seeds and all they depend on; `stop` nodes are included, their inputs are not followed.

    A seed that is itself a stop node is followed.
    """
    pending = list(seeds)
    seen = set(pending)
    first = set(pending)
    while pending:
        node = pending.pop()
        if node in stop and node not in first:
            continue
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return seen


def descendants(seed: Node, *, stop: set[Node] | frozenset[Node] = frozenset()) -> set[Node]:
    """The seed and all that depends on it; users of `stop` nodes are not followed."""
    pending, seen = [seed], {seed}
    while pending:
        node = pending.pop()
        if node in stop and node is not seed:
            continue
        for user in node.users:
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return seen
