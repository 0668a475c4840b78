"""All branches of a layer in which tokens pick experts, and, in a refresh, their cached state.

ids, weights [T, K]  ->  slot k of a token holds rank k of the router: slot_out, slot_ids, ...
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.fx.traceback import set_current_meta

from ..graph.evaluate import Evaluator
from ..graph.experts import inverse, sort_branches
from ..graph.region import MoERegion
from ..options import Options
from .cache_plan import LayerPlan
from .evidence import refresh_evidence
from .row_forecast import CachedRows, store_branches
from .run_experts import run_experts

moeca = torch.ops.moeca


def compute_slots(
    evaluator: Evaluator,
    layer: LayerPlan,
    options: Options,
    cached: CachedRows | None,
    evidence: list[Tensor],
) -> None:
    """Every branch is computed; with `cached` every row is also stored, and `evidence` of it."""
    region = cast(MoERegion, layer.region)
    with set_current_meta(region.routed):
        ids = evaluator.value(region.ids).reshape(layer.tokens, region.top_k)
        rows = [evaluator.value(r).reshape(layer.tokens, -1) for r in region.rows]
        order, groups = sort_branches(ids.reshape(-1), region.num_experts)
        token = torch.div(order, region.top_k, rounding_mode="floor")
        out = run_experts(evaluator, region, rows, token, groups, layer.branches)
        if cached is None:
            branches = out.index_select(0, inverse(order))
        else:
            share = _share(evaluator, layer)
            if layer.evidence:
                evidence.append(refresh_evidence(layer, cached, ids, share, rows, order, out))
            slot_out = cached.caches[layer.name("slot_out")]
            store_branches(layer, cached, ids, order, out)
            if slot_out.dtype == out.dtype:
                branches = moeca.cache_read(slot_out, layer.branches)
            else:  # a refresh is exact: it must not read what rounding left of its own rows
                branches = out.index_select(0, inverse(order))
            _store_slots(layer, options, cached.caches, ids, share, rows, order, out)
        evaluator.set(region.routed, branches.reshape(layer.tokens, region.top_k, -1))


def _share(evaluator: Evaluator, layer: LayerPlan) -> Tensor:
    """Router weights [T, K] as shares of their token's."""
    region = cast(MoERegion, layer.region)
    weights = evaluator.value(region.weights).reshape(layer.tokens, region.top_k).float().abs()
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-12)


def _store_slots(
    layer: LayerPlan,
    options: Options,
    caches: dict[str, Tensor],
    ids: Tensor,
    share: Tensor,
    rows: list[Tensor],
    order: Tensor,
    out: Tensor,
) -> None:
    def cache(field: str) -> Tensor:
        return caches[layer.name(field)]

    moeca.cache_fill(cache("slot_ids"), ids)
    moeca.cache_fill(cache("slot_weight"), share)
    moeca.cache_write(cache("slot_norm"), order, out.float().norm(dim=-1))
    spatial, _ = moeca.expert_thresholds(
        cache("spatial"), ids, options.tau, options.alpha, options.beta
    )
    moeca.cache_fill(cache("spatial"), spatial)
    if layer.tracks_drift:
        moeca.cache_fill(cache("slot_drift"), torch.zeros_like(share))
    if layer.selector.counts_age:
        moeca.cache_fill(cache("token_age"), torch.zeros_like(share[:, 0]))
    for field in layer.input_fields:
        for i, r in enumerate(rows):
            moeca.cache_fill(cache(f"{field}{i}"), r)
