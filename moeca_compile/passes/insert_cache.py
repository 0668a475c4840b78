"""The variants of a step, with explicit cache nodes around the matched regions.

    plain     as written, experts grouped
    refresh   as written + cache_fill / cache_write of everything another variant may read
    reuse     expert_thresholds, guard_branches -> rows; region roots become cache_write of the
              selected rows followed by cache_read
    forecast  outputs of attention and experts extrapolated, the rest as written (forecast.py)
    skip      the model's outputs extrapolated (forecast.py)
    probe     no step: how far the first layer's input has drifted (forecast.py)

Each builder is run under tracing: `variant_outputs` evaluates the graph's outputs with the region
roots replaced. Caches arrive by name as extra inputs; what was counted or measured leaves as an
extra output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.traceback import set_current_meta

from ..graph.evaluate import Evaluator
from ..graph.experts import sort_branches
from ..graph.region import ChoiceRegion
from ..graph.row_cache import RowCache
from ..options import Options
from .attention_first import AttentionFirst
from .cache_plan import CachePlan, LayerPlan
from .choice_layer import ChoiceAttentionFirst, ChoiceRouterFirst
from .choice_refresh import compute_all, count_chosen
from .forecast import (
    finish_refresh,
    hold_layers,
    keep_layers,
    probe_input,
    skip_outputs,
    update_layers,
)
from .reuse_layer import ReuseInputs, ReuseLayer
from .router_first import RouterFirst
from .run_experts import run_experts

moeca = torch.ops.moeca
VARIANTS = ("plain", "refresh", "reuse", "forecast", "skip")
ORDERS: dict[str, type[ReuseLayer]] = {
    "router_first": RouterFirst,
    "attention_first": AttentionFirst,
}
CHOICE_ORDERS: dict[str, type[ReuseLayer]] = {
    "router_first": ChoiceRouterFirst,
    "attention_first": ChoiceAttentionFirst,
}


@dataclass(frozen=True)
class VariantInputs:
    """What a variant's traced function receives besides the model's own inputs.

    counts: CPU int64 [layers, 2] under a budget: branches and tokens of each sample to compute; or
    the same as numbers.
    mix: float32 [n], what the policy mixes stored values by (`Policy.mix`).
    """

    caches: dict[str, Tensor]
    counts: Tensor | list[list[int]] | None = None
    mix: Tensor | None = None


def variant_outputs(
    gm: GraphModule,
    plan: CachePlan,
    options: Options,
    variant: str,
    inputs: dict[Node, Any],
    extra: VariantInputs,
) -> tuple[list[Any], Tensor | None]:
    """(the model's outputs, what a step counts or measures or None), evaluated under tracing.

    reuse, and full steps in `plan.counted`: int64 [layers, fields]. refresh with stored outputs:
    float32 [basis * basis], counts before it. probe: no outputs, float32 [1].
    """
    if variant == "skip":
        return skip_outputs(plan.histories, inputs, extra.caches, _mix(extra)), None
    evaluator = Evaluator(gm, inputs)
    if variant == "probe":
        return [], probe_input(plan.histories, evaluator, extra.caches)
    reuse = _install(evaluator, plan, options, variant, extra)
    # Layer by layer, so that the recursion never gets deeper than one layer.
    ends = {region.combine for region in (*(p.region for p in plan.layers), *plan.left_out)}
    for node in gm.graph.nodes:
        if node in ends:
            evaluator.value(node)
    outputs = [evaluator.value(n) for n in gm.graph.output_node().args[0]]  # type: ignore[union-attr]
    counts = count_chosen(evaluator, plan) if variant in plan.counted - {"reuse"} else None
    if variant == "refresh" and plan.histories.outputs:
        outputs, found = finish_refresh(plan.histories, inputs, extra.caches, _mix(extra), outputs)
        return [*outputs, *([] if counts is None else [counts])], found
    if variant != "reuse":
        return outputs, counts
    update_layers(plan.histories, evaluator, extra.caches)
    return outputs, torch.stack([r.counters() for r in reuse])


def _mix(extra: VariantInputs) -> Tensor:
    if extra.mix is None:
        raise ValueError("variant: expected the policy's coefficients, got none")
    return extra.mix


def _install(
    evaluator: Evaluator, plan: CachePlan, options: Options, variant: str, extra: VariantInputs
) -> list[ReuseLayer]:
    """Replace what the variant does not compute as written; the reuse layers, where it has any."""
    reuse: list[ReuseLayer] = []
    if variant == "forecast":
        hold_layers(plan.histories, evaluator, extra.caches, _mix(extra))
        return reuse
    for number, layer in enumerate(plan.layers):
        if variant == "reuse":
            reuse.append(_reuse_layer(evaluator, layer, number, options, extra, plan.needed))
            reuse[-1].install()
        else:
            stores = variant == "refresh" and plan.stored.rows
            _install_full(evaluator, layer, options, extra.caches if stores else None)
    if variant == "refresh":
        keep_layers(plan.histories, evaluator, extra.caches)
    return reuse


def _reuse_layer(
    evaluator: Evaluator,
    layer: LayerPlan,
    number: int,
    options: Options,
    extra: VariantInputs,
    needed: frozenset[Node],
) -> ReuseLayer:
    counts = (None, None) if extra.counts is None else tuple(extra.counts[number])
    orders = CHOICE_ORDERS if isinstance(layer.region, ChoiceRegion) else ORDERS
    order = orders[options.order]
    return order(evaluator, layer, options, ReuseInputs(extra.caches, *counts), needed)


def _install_full(
    evaluator: Evaluator, layer: LayerPlan, options: Options, caches: dict[str, Tensor] | None
) -> None:
    """Every row is computed; with `caches` every row is also stored."""
    region = layer.region
    route = compute_all if isinstance(region, ChoiceRegion) else _route_all
    evaluator.replace(region.routed, lambda: route(evaluator, layer, options, caches))
    if caches is None:
        return

    stores: dict[Node, list[Callable[[Tensor], None]]] = {}
    for attention in layer.attention:
        for cache in (attention.root, *attention.key_value, *attention.own_input):
            stores.setdefault(cache.root.node, []).append(partial(_fill_rows, caches, cache))
    for number, cache in enumerate(layer.shared):
        norms = [caches[layer.name(n)] for n in layer.shared_norms[number : number + 1]]
        store = partial(_fill_rows, caches, cache, norms=norms)
        stores.setdefault(cache.root.node, []).append(store)
    for node, actions in stores.items():
        evaluator.replace(node, partial(_compute_and_store, evaluator, node, actions))


def _compute_and_store(
    evaluator: Evaluator, node: Node, actions: Sequence[Callable[[Tensor], None]]
) -> None:
    value = evaluator.run_own(node)
    evaluator.set(node, value)
    with set_current_meta(node):
        for act in actions:
            act(value)


def _fill_rows(
    caches: dict[str, Tensor], cache: RowCache, value: Tensor, norms: Sequence[Tensor] = ()
) -> None:
    """Store all rows of a value, and where asked for their norms [T]."""
    rows = cache.to_rows(value)
    moeca.cache_fill(caches[cache.name], rows)
    for norm in norms:
        moeca.cache_fill(norm, rows.float().norm(dim=-1))


def _route_all(
    evaluator: Evaluator, layer: LayerPlan, options: Options, caches: dict[str, Tensor] | None
) -> None:
    region = layer.region
    with set_current_meta(region.routed):
        ids = evaluator.value(region.ids).reshape(layer.tokens, region.top_k)
        rows = [evaluator.value(r).reshape(layer.tokens, -1) for r in region.rows]
        order, groups = sort_branches(ids.reshape(-1), region.num_experts)
        token = torch.div(order, region.top_k, rounding_mode="floor")
        out = run_experts(evaluator, region, rows, token, groups)
        if caches is None:
            branches = out.index_select(0, torch.argsort(order))
        else:
            slot_out = caches[layer.name("slot_out")]
            moeca.cache_write(slot_out, order, out)
            if slot_out.dtype == out.dtype:
                branches = moeca.cache_read(slot_out, layer.branches)
            else:  # a refresh is exact: it must not read what rounding left of its own rows
                branches = out.index_select(0, torch.argsort(order))
            _store_slots(evaluator, layer, options, caches, ids, rows, order, out)
        evaluator.set(region.routed, branches.reshape(layer.tokens, region.top_k, -1))


def _store_slots(
    evaluator: Evaluator,
    layer: LayerPlan,
    options: Options,
    caches: dict[str, Tensor],
    ids: Tensor,
    rows: list[Tensor],
    order: Tensor,
    out: Tensor,
) -> None:
    def cache(field: str) -> Tensor:
        return caches[layer.name(field)]

    weights = evaluator.value(layer.region.weights).reshape(ids.shape).float().abs()
    share = weights / weights.sum(1, keepdim=True).clamp(min=1e-12)
    moeca.cache_fill(cache("slot_ids"), ids)
    moeca.cache_fill(cache("slot_weight"), share)
    moeca.cache_write(cache("slot_norm"), order, out.float().norm(dim=-1))
    spatial, _ = moeca.expert_thresholds(
        cache("spatial"), ids, options.tau, options.alpha, options.beta
    )
    moeca.cache_fill(cache("spatial"), spatial)
    if layer.tracks_drift:
        moeca.cache_fill(cache("slot_drift"), torch.zeros_like(share))
    for field in layer.input_fields:
        for i, r in enumerate(rows):
            moeca.cache_fill(cache(f"{field}{i}"), r)
