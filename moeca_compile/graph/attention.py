"""Attention regions by structure: a core (SDPA, or softmax between two products) and its root.

manual:  softmax(scale * q @ k^T) @ v           core = the second product
root:    the projection behind the core, up to the first op that mixes in another value
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from .dry_run import DryRun, dry_pull
from .layout import Layout, RowSpace, free, row_layout, tags
from .region import AttentionRegion, NoMatch, RowRoot, module_path
from .row_rules import VIEWS, Stop, pointwise, rule_for, shape_of, view_back

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
PRODUCTS = {aten.matmul.default, aten.bmm.default}
PROJECTIONS = {aten.linear.default, aten.addmm.default}
SOFTMAX = {aten.softmax.int, aten._softmax.default}
# What may follow the core inside the region: a projection and changes of shape or dtype.
BEHIND = VIEWS | {
    aten.linear.default,
    aten.to.dtype,
    aten.clone.default,
    aten.contiguous.default,
    aten.dropout.default,
}


def find_attention(gm: GraphModule, missed: list[NoMatch]) -> list[AttentionRegion]:
    """All attention regions whose output has token rows in front; others go to `missed`."""
    regions = []
    for node in gm.graph.nodes:
        operands = _operands(node)
        if operands is None:
            continue
        core, key, value = operands
        region = _region(core, key, value)
        if isinstance(region, NoMatch):
            missed.append(region)
        else:
            regions.append(region)
    return regions


def _operands(node: Node) -> tuple[Node, Node, Node] | None:
    """(core, key, value) if the node is an SDPA call or a softmax between two products."""
    if node.target is SDPA:
        return node, node.args[1], node.args[2]  # type: ignore[return-value]
    if node.target not in SOFTMAX:
        return None
    scores = node.args[0]
    while isinstance(scores, Node) and scores.target not in PRODUCTS:
        if rule_for(scores.target) is not pointwise or not scores.args:
            return None
        scores = scores.args[0]
    core = node
    while len(core.users) == 1:
        (core,) = core.users
        if core.target in PRODUCTS:
            return core, scores.args[1], core.args[1]  # type: ignore[union-attr,return-value]
        if core.target not in BEHIND:
            return None
    return None


def _region(core: Node, key: Node, value: Node) -> AttentionRegion | NoMatch:
    root = core
    while len(root.users) == 1:
        (user,) = root.users
        if user.target not in BEHIND or user.args[0] is not root:
            break
        root = user
    root, space = _token_rows(core, root)
    name = module_path(core)
    if space is None:
        return NoMatch("attention", name, "its output has no token rows [B, N, ...] in front", core)
    layout = row_layout(shape_of(root), space)
    assert layout is not None
    out = RowRoot(root, layout)
    dry = dry_pull([out], set(), space)
    source = _first_input(core, dry) if dry is not None else None
    if dry is None or source is None:
        return NoMatch("attention", name, "rows of its output do not lead to query rows", root)
    cached = _key_value(core, key, value, dry.requested[core], space)
    return AttentionRegion(name, space, out, core, cached, source)


def _first_input(core: Node, dry: DryRun) -> RowRoot | None:
    """What the projection nearest above the queries reads; None if the core was not passed."""
    pending, seen = [core.args[0]], {core}
    while pending and core in dry.pulled:
        node = pending.pop(0)
        if not isinstance(node, Node) or node in seen or node not in dry.pulled:
            continue
        seen.add(node)
        if node.target in PROJECTIONS:
            source = node.args[1 if node.target is aten.addmm.default else 0]
            if source in dry.requested:
                return RowRoot(source, dry.requested[source])  # type: ignore[index]
        pending += node.all_input_nodes
    query = core.args[0]  # no projection of the kinds known: the queries themselves
    found = core in dry.pulled and query in dry.requested
    return RowRoot(query, dry.requested[query]) if found else None  # type: ignore[arg-type,index]


def _token_rows(core: Node, root: Node) -> tuple[Node, RowSpace | None]:
    """The last node from core to root that has token rows in front, and its row space."""
    tokens = shape_of(core)[-2]
    while True:
        shape = shape_of(root)
        if len(shape) >= 2 and shape[1] == tokens and root is not core:
            return root, RowSpace(shape[0], tokens)
        if len(shape) == 2 and shape[0] % tokens == 0 and root is not core:
            return root, RowSpace(shape[0] // tokens, tokens)
        if root is core:
            return root, None
        root = root.args[0]  # type: ignore[assignment]


def pull_attention(region: AttentionRegion, available: set[Node]) -> DryRun | None:
    """Dry run of the region's root for a few query rows per sample."""
    root = region.root
    return dry_pull([root], available - {root.node}, region.space)


def _key_value(
    core: Node, key: Node, value: Node, requested: Layout, space: RowSpace
) -> tuple[RowRoot, ...]:
    """Row roots of K and V; empty where their rows are not the query's tokens."""
    roots: list[RowRoot] = []
    for operand in (key, value):
        row_dim = -1 if operand is key and core.target is not SDPA else -2
        root = _row_root(operand, row_dim, requested, space)
        if root is None:
            return ()
        if root not in roots:
            roots.append(root)
    return tuple(roots)


def _row_root(operand: Node, row_dim: int, requested: Layout, space: RowSpace) -> RowRoot | None:
    shape = shape_of(operand)
    if len(shape) != len(requested) or shape[row_dim] != space.tokens:
        return None
    dims = [
        d if tags(d) and shape[i] == _size(d) else free(shape[i])
        for i, d in enumerate(requested[:-2])
    ]
    last = [free(shape[-2]), free(shape[-1])]
    last[row_dim] = requested[-2]
    layout = (*dims, *last)
    if tags(layout) != tags(requested):
        return None
    node, layout = _above_views(operand, layout)
    dry = dry_pull([RowRoot(node, layout)], set(), space)
    return RowRoot(node, layout) if dry is not None and node in dry.pulled else None


def _above_views(node: Node, layout: Layout) -> tuple[Node, Layout]:
    """Cache above changes of shape and repeated heads: rows are then contiguous and stored once."""
    while True:
        try:
            if node.target in VIEWS:
                above = view_back(node, layout)
            elif node.target is aten.repeat_interleave.self_int:
                shape = shape_of(node.args[0])
                above = tuple(
                    d if _size(d) == s else free(s) for d, s in zip(layout, shape, strict=True)
                )
            elif node.target in (aten.clone.default, aten.contiguous.default):
                above = layout
            else:
                return node, layout
        except Stop:
            return node, layout
        if tags(above) != tags(layout):
            return node, layout
        node, layout = node.args[0], above  # type: ignore[assignment]


def _size(dim: tuple) -> int:
    size = 1
    for factor in dim:
        size *= factor.size
    return size
