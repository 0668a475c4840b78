"""All branches of a layer in which experts pick tokens, and, in a refresh, their cached state.

places [R], gates [R]  ->  slot_out row r: the output of place r;  slot_ids[r]: its branch
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.fx.traceback import set_current_meta

from ..graph.evaluate import Evaluator
from ..graph.experts import SortedRows, sort_branches
from ..graph.region import ChoiceRegion
from ..lowering.choice_guards import chosen_mask
from ..lowering.guards import chosen_thresholds
from ..options import Options
from ..runtime.telemetry import FIELDS
from .cache_plan import CachePlan, LayerPlan
from .choice_layer import gates_of
from .reuse_inputs import MIN_ROWS
from .reuse_layer import moeca
from .run_experts import run_experts


def compute_all(
    evaluator: Evaluator, layer: LayerPlan, options: Options, caches: dict[str, Tensor] | None
) -> None:
    """Every branch is computed; with `caches` every row is also stored."""
    region = cast(ChoiceRegion, layer.region)
    with set_current_meta(region.routed):
        places = evaluator.value(region.ids).reshape(-1)
        valid = None if region.valid is None else evaluator.value(region.valid).reshape(-1)
        rows = [evaluator.value(r).reshape(layer.tokens, -1) for r in region.rows]
        order, groups = sort_branches(places % region.num_experts, region.num_experts, valid)
        if valid is None:
            each = layer.branches // region.num_experts
            groups = SortedRows(groups.ends, groups.experts, each)
        else:
            count = valid.sum().clamp(min=MIN_ROWS).item()
            torch._check(count >= MIN_ROWS)
            torch._check(count <= layer.branches)
            order = order.narrow(0, 0, count)
            groups = SortedRows(groups.ends, groups.experts.narrow(0, 0, count))
        token = torch.div(places, region.num_experts, rounding_mode="floor").index_select(0, order)
        out = run_experts(evaluator, region, rows, token, groups, layer.branches)
        slot_out = None if caches is None else caches[layer.name("slot_out")]
        if caches is not None:
            moeca.cache_write(slot_out, order, out)
        if slot_out is not None and slot_out.dtype == out.dtype:
            branches = moeca.cache_read(slot_out, layer.branches)
        else:  # a refresh is exact: it must not read what rounding left of its own rows
            branches = out.new_zeros(layer.branches, out.shape[-1]).index_copy(0, order, out)
        if caches is not None:
            moeca.cache_write(caches[layer.name("slot_norm")], order, out.float().norm(dim=-1))
            _store_places(evaluator, layer, options, caches, places, valid, rows)
        if valid is not None:
            branches = torch.where(valid.unsqueeze(-1), branches, 0)
        evaluator.set(region.routed, branches)


def _store_places(
    evaluator: Evaluator,
    layer: LayerPlan,
    options: Options,
    caches: dict[str, Tensor],
    places: Tensor,
    valid: Tensor | None,
    rows: list[Tensor],
) -> None:
    def cache(field: str) -> Tensor:
        return caches[layer.name(field)]

    region = cast(ChoiceRegion, layer.region)
    share = gates_of(region, evaluator.value(region.weights).reshape(-1), valid)
    moeca.cache_fill(cache("slot_ids"), places if valid is None else torch.where(valid, places, -1))
    moeca.cache_fill(cache("slot_weight"), share)
    chosen = chosen_mask(places, valid, layer.tokens, region.num_experts)
    spatial, _ = chosen_thresholds(
        cache("spatial"), chosen, options.tau, options.alpha, options.beta
    )
    moeca.cache_fill(cache("spatial"), spatial)
    if layer.tracks_drift:
        moeca.cache_fill(cache("slot_drift"), torch.zeros_like(share))
    if layer.selector.counts_age:
        moeca.cache_fill(cache("token_age"), share.new_zeros(layer.tokens))
    for field in layer.input_fields:
        for i, r in enumerate(rows):
            moeca.cache_fill(cache(f"{field}{i}"), r)


def count_chosen(evaluator: Evaluator, plan: CachePlan) -> Tensor:
    """int64 [layers, FIELDS] of a step that computes everything: what only the data has."""
    lines = []
    for layer in plan.layers:
        valid: Any = getattr(layer.region, "valid", None)
        found = 0 if valid is None else evaluator.value(valid).sum()
        zero = torch.zeros((), dtype=torch.int64, device=plan.device)
        counts = {"branches": found, "branches_computed": found}
        lines.append(torch.stack([zero + counts.get(name, 0) for name in FIELDS]))
    return torch.stack(lines)
