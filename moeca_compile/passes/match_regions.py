"""Find router -> experts -> combine and attention, by dataflow; the graph is not changed.

Every claim is checked by a dry run of the push-down on fake rows: an attention region is one whose
output rows can be computed from the query rows of the core; a shared expert is a row function of
the expert input; attention belongs to a MoE layer if only elementwise work lies between them.

    [B, N, D] root <- projection <- core <- q rows, K root, V root      AttentionRegion
    combine = weights [T, K] x routed_experts [T, K, D]                  MoERegion
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..graph.attention import find_attention, pull_attention
from ..graph.chosen import chosen_experts
from ..graph.dataflow import ancestors, descendants, is_heavy
from ..graph.dry_run import dry_pull
from ..graph.experts import num_experts_of, routed_experts
from ..graph.layout import RowSpace, is_windowed, row_layout, tags
from ..graph.region import (
    AttentionRegion,
    MoERegion,
    NoMatch,
    Regions,
    RowRoot,
    module_path,
)
from ..graph.row_rules import shape_of
from ..graph.streams import asked_by
from .combine_ops import ADDS_ROWS, THROUGH
from .find_combine import find_combine
from .match_choice import draft_choice

aten = torch.ops.aten


def match_regions(gm: GraphModule) -> Regions:
    """All regions of a normalised graph, and the near misses with reason and node."""
    missed: list[NoMatch] = []
    attention = find_attention(gm, missed)
    drafts: list[MoERegion] = []
    for node in gm.graph.nodes:
        if node.target is chosen_experts:
            found = draft_choice(node, attention)
        elif node.target is routed_experts:
            found = _draft_moe(node, attention)
        else:
            continue
        (missed if isinstance(found, NoMatch) else drafts).append(found)  # type: ignore[arg-type]
    cuts = {d.routed for d in drafts} | {a.root.node for a in attention}
    needed = needed_in_full(gm, drafts, cuts, attention)
    taken: set[Node] = set()
    regions = []
    for draft in drafts:
        region = _pair_attention(draft, attention, cuts, needed, taken, missed)
        regions.append(replace(region, shared=_shared_experts(region, gm, drafts, cuts)))
    roots = {r.routed for r in regions}
    roots |= {a.root.node for r in regions for a in r.attention}
    roots |= {s.node for r in regions for s in r.shared}
    paired = [a for r in regions for a in r.attention]
    final = frozenset(needed_in_full(gm, regions, roots, paired))
    # other streams of a paired core are computed in full, as they should be
    beside = {a.root.node for a in attention if a.core in {p.core for p in paired}}
    left = tuple(m for m in missed if m.kind != "attention" or m.node not in beside)
    moe = tuple(
        replace(r, attention=tuple(_with_stream(a, roots, final) for a in r.attention))
        for r in regions
    )
    streams = {a.root.node: a.stream for r in moe for a in r.attention}
    found = tuple(replace(a, stream=streams.get(a.root.node)) for a in attention)
    return Regions(moe, found, left, final)


def _with_stream(
    region: AttentionRegion, roots: set[Node], needed: frozenset[Node]
) -> AttentionRegion:
    """With the one value, needed in full anyway, whose token rows the attention is made from."""
    dry = pull_attention(region, set(needed))
    met = dry.requested.items() if dry is not None else ()
    streams = [
        RowRoot(node, layout)
        for node, layout in met
        if node in needed - roots
        and node.op != "placeholder"
        and set().union(*map(tags, layout)) == {"b", "n"}
        and not is_windowed(layout, region.space)
    ]
    return replace(region, stream=streams[0]) if len(streams) == 1 else region


def needed_in_full(
    gm: GraphModule,
    regions: list[MoERegion],
    cuts: set[Node],
    joint: Sequence[AttentionRegion] = (),
) -> set[Node]:
    """Nodes a reuse step evaluates on all rows: everything but the inside of regions.

    joint: attention whose other streams are computed without this one's query rows.
    """
    seeds = [gm.graph.output_node()]
    for region in regions:
        seeds += [*region.routing, *region.rows]
    parts = {p.node: p for a in joint for p in a.beside}
    cached = {root.node for a in joint for root in a.key_value}
    needed = ancestors(seeds, stop=cuts | parts.keys())
    done: set[Node] = set()
    while waiting := (parts.keys() & needed) - done:
        asked = {n for part in waiting for n in asked_by(parts[part])} - cached
        stops = cuts | parts.keys() | cached
        needed |= (asked & stops) | (ancestors(asked - stops, stop=stops) - cached)
        done |= waiting
    return needed


def _draft_moe(routed: Node, attention: list[AttentionRegion]) -> MoERegion | NoMatch:
    _, ids, rows, params = routed.args
    name = module_path(routed)
    tokens, top_k = shape_of(ids)
    found = find_combine(routed, tokens, top_k)
    if isinstance(found, NoMatch):
        return found
    combine, weights = found
    space = next((a.space for a in attention if a.space.rows == tokens), RowSpace(1, tokens))
    return MoERegion(
        name=name,
        space=space,
        routed=routed,
        ids=ids,  # type: ignore[arg-type]
        weights=weights,
        rows=tuple(rows),  # type: ignore[arg-type]
        combine=combine,
        num_experts=num_experts_of(params),  # type: ignore[arg-type]
        top_k=top_k,
    )


def _pair_attention(
    draft: MoERegion,
    attention: list[AttentionRegion],
    cuts: set[Node],
    needed: set[Node],
    taken: set[Node],
    missed: list[NoMatch],
) -> MoERegion:
    before = ancestors([*draft.rows, *draft.routing], stop=cuts)
    to_rows = ancestors(list(draft.rows), stop=cuts)
    paired: list[AttentionRegion] = []
    for region in reversed(attention):  # attention may feed the queries of another
        root = region.root.node
        if root not in before or root in taken:
            continue
        between = to_rows - {p.root.node for p in paired}
        reason = _unpairable(draft, region, between, needed, cuts)
        if reason:
            missed.append(NoMatch("attention", region.name, reason, root))
            continue
        if any(part.node in before for part in region.beside):
            region = replace(region, beside=())  # routing waits for them: nothing can be put off
        taken.add(root)
        paired.append(region)
    return replace(draft, attention=tuple(reversed(paired)))


def _unpairable(
    draft: MoERegion,
    region: AttentionRegion,
    to_rows: set[Node],
    needed: set[Node],
    cuts: set[Node],
) -> str | None:
    root = region.root.node
    heavy = [n for n in descendants(root, stop=cuts) & to_rows if is_heavy(n) and n is not root]
    if heavy:
        return f"{heavy[0].name} lies between this attention and the next routing"
    if region.space != draft.space:
        return f"attends {region.space.rows} rows, the MoE layer routes {draft.space.rows}"
    for rows in draft.rows:
        layout = row_layout(shape_of(rows), draft.space)
        if layout is None:
            return "the expert input has no token rows in front"
        outside = needed - descendants(root, stop=cuts)
        dry = dry_pull([RowRoot(rows, layout)], outside | cuts, draft.space)
        if (
            dry is None
            or root in dry.stops
            or dry.requested.get(root) not in (None, region.root.layout)
        ):
            return "the order of the token rows changes between attention and routing"
    dry = pull_attention(region, needed)
    if dry is None or region.core not in dry.pulled:
        reason = "its rows cannot be computed alone"
        return reason if dry is None else f"{reason}: {next(iter(dry.stops.values()), '')}"
    return None


def _shared_experts(
    region: MoERegion, gm: GraphModule, drafts: list[MoERegion], cuts: set[Node]
) -> tuple[RowRoot, ...]:
    """Operands added to the combined output that are heavy row functions of the expert input."""
    shared: list[RowRoot] = []
    node = region.combine
    if node.target in ADDS_ROWS:
        root = _shared_root(node.args[0], region, gm, drafts, cuts)  # type: ignore[arg-type]
        shared += [root] if root else []
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in (aten.add.Tensor, aten.add_.Tensor):
            other = [a for a in user.args if isinstance(a, Node) and a is not node]
            root = _shared_root(other[0], region, gm, drafts, cuts) if other else None
            if root:
                shared.append(root)
            elif shape_of(user) != shape_of(node):
                break
        elif user.target not in THROUGH | {aten.sum.dim_IntList, aten.squeeze.dim}:
            break
        node = user
    return tuple(shared)


def _shared_root(
    node: Node, region: MoERegion, gm: GraphModule, drafts: list[MoERegion], cuts: set[Node]
) -> RowRoot | None:
    layout = row_layout(shape_of(node), region.space)
    if layout is None or not tags(layout):
        return None
    outside = needed_in_full(gm, drafts, cuts | {node}) | cuts
    dry: Any = dry_pull([RowRoot(node, layout)], outside - {node}, region.space)
    if dry is None or dry.stops or not any(is_heavy(n) for n in dry.pulled):
        return None
    return RowRoot(node, layout)
