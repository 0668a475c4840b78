"""Attention regions by structure: a core (SDPA, or softmax between two products) and its root.

manual:  softmax(scale * q @ k^T) @ v           core = the second product; written with einsum it is
                                               brought into this form by passes/normalize_attention
root:    the projection behind the core, up to the first op that mixes in another value
joint:   a core over several streams, split behind it, has a root for each; see streams.py
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from .dataflow import ancestors
from .dry_run import DryRun, dry_pull
from .key_value import SDPA, key_value_rows
from .layout import RowSpace, is_windowed, row_layout
from .region import AttentionRegion, NoMatch, RowRoot, module_path
from .row_rules import VIEWS, pointwise, rule_for, shape_of
from .streams import Above, Limits, stream_parts

aten = torch.ops.aten
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
    regions: list[AttentionRegion] = []
    cores: set[Node] = set()  # nothing is looked for above another attention
    above: set[Node] = set()  # nor, if that is enough, above what an earlier one reads
    for node in gm.graph.nodes:
        operands = _operands(node)
        if operands is None:
            continue
        found = _regions(operands, Limits(frozenset(cores | above), frozenset(cores)))
        cores.add(operands[0])
        for region in found:
            if isinstance(region, NoMatch):
                missed.append(region)
            else:
                regions.append(region)
                above |= ancestors(region.input.node.all_input_nodes, stop=above)
    return regions


def softmax_products(node: Node, products: Set[Any]) -> tuple[Node, Node] | None:
    """(scores, core): the two of `products` in front of and behind a softmax, or None.

    Between scores and softmax the scores are scaled, masked or cast, element by element.
    """
    if node.target not in SOFTMAX:
        return None
    scores = node.args[0]
    while isinstance(scores, Node) and scores.target not in products:
        if rule_for(scores.target) is not pointwise or not scores.args:
            return None
        scores = scores.args[0]
    core = node
    while isinstance(scores, Node) and len(core.users) == 1:
        (core,) = core.users
        if core.target in products:
            return scores, core
        if core.target not in BEHIND:
            return None
    return None


def _operands(node: Node) -> tuple[Node, Node, Node] | None:
    """(core, key, value) if the node is an SDPA call or a softmax between two products."""
    if node.target is SDPA:
        return node, node.args[1], node.args[2]  # type: ignore[return-value]
    found = softmax_products(node, PRODUCTS)
    if found is None:
        return None
    scores, core = found
    return core, scores.args[1], core.args[1]  # type: ignore[return-value]


def _regions(operands: tuple[Node, Node, Node], limits: Limits) -> list[AttentionRegion | NoMatch]:
    """One region, or one for every stream that the output is split into."""
    core = operands[0]
    last = _behind(core)
    root, space = _token_rows(core, last)
    if space is None:
        reason = "its output has no token rows [B, N, ...] in front"
        return [NoMatch("attention", module_path(core), reason, core)]
    parts = stream_parts(last, space) if root is last else ()
    if not parts:
        return [_region(operands, root, space, limits)]
    found = []
    for part in parts:
        root = _behind(part.node)
        while row_layout(shape_of(root), part.space) is None:
            root = cast(Node, root.args[0])
        region = _region(operands, root, part.space, limits)
        if isinstance(region, AttentionRegion):
            region = replace(region, beside=tuple(p for p in parts if p is not part))
        found.append(region)
    return found


def _behind(node: Node) -> Node:
    """The last of what follows: a projection and changes of shape or dtype."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target not in BEHIND or user.args[0] is not node:
            break
        node = user
    return node


def _region(
    operands: tuple[Node, Node, Node], root: Node, space: RowSpace, limits: Limits
) -> AttentionRegion | NoMatch:
    core, key, value = operands
    name = module_path(core)
    layout = row_layout(shape_of(root), space)
    assert layout is not None
    out = RowRoot(root, layout)
    for limit in (limits.near, limits.far):
        dry = dry_pull([out], limit, space)
        source = _first_input(core, dry, space) if dry is not None else None
        if dry is not None and source is not None:
            above = Above(space, limit, limits.far)
            cached = key_value_rows(core, (key, value), dry, source, above)
            return AttentionRegion(name, space, out, core, cached, source)
    return NoMatch("attention", name, "rows of its output do not lead to query rows", root)


def _first_input(core: Node, dry: DryRun, space: RowSpace) -> RowRoot | None:
    """What the projection nearest above the queries reads; None if the core was not passed.

    Where it reads joined streams: the nearest value above that has the tokens alone.
    """
    pending, seen = [core.args[0]], {core}
    while pending and core in dry.pulled:
        node = pending.pop(0)
        if not isinstance(node, Node) or node in seen or node not in dry.pulled:
            continue
        seen.add(node)
        if node.target in PROJECTIONS:
            source = node.args[1 if node.target is aten.addmm.default else 0]
            if source in dry.requested:
                return _alone(source, dry, space)  # type: ignore[arg-type]
        pending += node.all_input_nodes
    query = core.args[0]  # no projection of the kinds known: the queries themselves
    found = core in dry.pulled and query in dry.requested
    return _alone(query, dry, space) if found else None  # type: ignore[arg-type]


def _alone(node: Node, dry: DryRun, space: RowSpace) -> RowRoot | None:
    """The node, or the nearest above it, whose rows are the tokens' and no others."""
    pending = [node]
    while pending:
        node = pending.pop(0)
        layout = dry.requested.get(node)
        if layout is not None and not is_windowed(layout, space):
            return RowRoot(node, layout)
        pending += node.all_input_nodes if layout is not None else []
    return None


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
