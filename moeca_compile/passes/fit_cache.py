"""A byte limit: layers that do not fit are left out of the cache and computed as written.

    max_cache_bytes = 8 MiB; layers of 3, 3 and 4 MiB saving 30, 30 and 20 GFLOPs a step
    ->  the third is left out; a reuse step computes it in full, as a refresh does

Layers are kept in the order of the arithmetic they save per byte, as long as they fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.fx import GraphModule

from ..graph.region import MoERegion, Regions
from ..graph.retrace import AtenGraph
from ..options import Options
from .cache_plan import CachePlan, plan_cache
from .count_flops import count_costs
from .match_regions import needed_in_full


def fit_cache(plan: CachePlan, regions: Regions, aten: AtenGraph, options: Options) -> CachePlan:
    """`plan` where it fits into `options.max_cache_bytes`, else one with fewer layers.

    What is kept whole, the model's outputs, belongs to no layer: where that alone is too much,
    nothing is cached at all.
    """
    limit = options.max_cache_bytes
    if limit is None or plan.layout.nbytes <= limit:
        return plan
    bare = plan_cache(_only(regions, (), aten.gm), aten, options)
    if bare.layout.nbytes > limit:
        return replace(_empty(bare), left_out=regions.moe)
    # One layer alone: its rows, or its outputs where layers are extrapolated.
    alone = [plan_cache(_only(regions, (r,), aten.gm), aten, options) for r in regions.moe]
    sizes = [each.layout.nbytes - bare.layout.nbytes for each in alone]
    saved = [cost.full_flops for cost in count_costs(aten, plan, options).layers]
    free, kept = limit - bare.layout.nbytes, set[int]()
    for i in sorted(range(len(sizes)), key=lambda i: (-saved[i] / max(sizes[i], 1), i)):
        if sizes[i] <= free:
            kept.add(i)
            free -= sizes[i]
    chosen = tuple(r for i, r in enumerate(regions.moe) if i in kept)
    left = tuple(r for i, r in enumerate(regions.moe) if i not in kept)
    return replace(plan_cache(_only(regions, chosen, aten.gm), aten, options), left_out=left)


def _only(regions: Regions, moe: Sequence[MoERegion], gm: GraphModule) -> Regions:
    """`regions` as if nothing but `moe`, and the attention paired with it, had matched."""
    paired = tuple(a for r in moe for a in r.attention)
    roots = {r.routed for r in moe} | {a.root.node for a in paired}
    roots |= {s.node for r in moe for s in r.shared}
    needed = frozenset(needed_in_full(gm, list(moe), roots, paired))
    return replace(regions, moe=tuple(moe), attention=paired, needed=needed)


def _empty(plan: CachePlan) -> CachePlan:
    nothing = replace(plan.histories, outputs=(), sample=None, input=None)
    return replace(plan, histories=nothing, layout=type(plan.layout)(()))
