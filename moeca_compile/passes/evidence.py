"""What a step says about the error of reusing rows, three numbers a layer, averaged over layers.

    drift     relative change of the experts' inputs since their branches were computed, weighted by
              router weight and output norm; of branches that were not computed again
    switched  share of the router weight that went to experts not cached for their token
    error     at a refresh: relative error of what the cached branches would have given instead

float32 [3], an extra output of the refresh and the reuse graph; policies/evidence.py reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .row_forecast import CachedRows, old_slots

if TYPE_CHECKING:
    from .cache_plan import LayerPlan
    from .reuse_layer import ReuseLayer

TINY = 1e-12


def relative_drift(now: Tensor, then: Tensor) -> Tensor:
    """|now - then| / |then| of every row: [T, W] -> [T], float32."""
    size = then.float().norm(dim=-1).clamp(min=TINY)
    now = now.to(then.dtype).float()  # what rounding took from the cached row is no drift
    return (now - then.float()).norm(dim=-1) / size


def reuse_evidence(layer: ReuseLayer) -> Tensor:
    """[3] of a reuse step, as its guard saw it; the error is not known: 0."""
    assert layer.drifted is not None
    norm = layer.cache("slot_norm")[: layer.layer.branches].reshape(layer.share.shape)
    weight = torch.where(layer.matched, layer.share * norm, 0.0)
    kept = torch.where(layer.computed, 0.0, weight) * layer.drifted
    switched = torch.where(layer.matched, 0.0, layer.share).sum() / layer.layer.tokens
    drift = kept.sum() / weight.sum().clamp(min=TINY)
    return torch.stack([drift, switched, torch.zeros_like(drift)])


def refresh_evidence(
    layer: LayerPlan,
    cached: CachedRows,
    ids: Tensor,
    share: Tensor,
    rows: Sequence[Tensor],
    order: Tensor,
    out: Tensor,
) -> Tensor:
    """[3] of a refresh, before anything is stored.

    ids, share: [T, K] in the router's order; rows: expert inputs [T, Din]; out: [T * K, D] of the
    branches in `order`.
    """
    caches = cached.caches
    branch, same = old_slots(caches[layer.name("slot_ids")], ids)
    before = cached.read(layer.name("slot_out"), layer.slot_times, layer.branches)
    weight = share.reshape(-1)
    by_order = torch.where(same, weight, 0.0).index_select(0, order)
    off = out.float() - before.index_select(0, branch.index_select(0, order)).float()
    size = out.float().norm(dim=-1)
    error = (by_order * off.norm(dim=-1)).norm() / (by_order * size).norm().clamp(min=TINY)
    token = torch.div(order, layer.region.top_k, rounding_mode="floor")
    inputs = [caches[layer.name(f"token_in{i}")] for i in range(len(rows))]
    moved = torch.stack([relative_drift(r, c) for r, c in zip(rows, inputs)]).sum(0)
    importance = weight.index_select(0, order) * size
    drift = (importance * moved.index_select(0, token)).sum() / importance.sum().clamp(min=TINY)
    switched = torch.where(same, 0.0, weight).sum() / layer.tokens
    return torch.stack([drift, switched, error])


def average(layers: Sequence[Tensor]) -> Tensor:
    """[3] of all layers."""
    return torch.stack(list(layers)).mean(0)
