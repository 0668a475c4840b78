"""What one step and one row of each region costs, from the graph alone (fake tensors, no work).

count_costs(aten, plan, options) -> Costs(LayerCost per MoE layer, fixed FLOPs, forecast FLOPs)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..graph.dry_run import dry_pull
from ..graph.experts import ExpertRows, SortedRows, per_expert
from ..graph.region import RowRoot
from ..graph.retrace import AtenGraph
from ..lowering.expert_programs import program_flops
from ..options import Options
from ..runtime.stats import Costs, LayerCost
from .cache_plan import CachePlan, LayerPlan
from .insert_cache import VariantInputs, variant_outputs


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """Two products over [.., queries, keys]; the shapes are given, not the tensors."""
    *batch, queries, width = q
    rows = queries
    for size in batch:
        rows *= size
    return 2 * rows * k[-2] * (width + v[-1])


def _grouped_flops(rows: Any, ends: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    if not isinstance(rows[0], int):
        return 0  # as many as the data says: counted from what runs
    return 2 * rows[0] * rows[1] * weights[0][-2]


def _program_flops(
    rows: Any,
    index: Any,
    ends: Any,
    params: Any,
    counts: Any,
    program: str,
    width: Any,
    **kwargs: Any,
) -> int:
    if not isinstance(index[0], int):
        return 0  # as many as the data says: counted from what runs
    given = iter(params)
    shapes: list[Any] = []
    for count in counts:
        stacked, *_ = [next(given) for _ in range(count)]
        shapes.append(stacked[1:] if count == 1 else stacked)
    return program_flops(program, index[0], len(rows), shapes)


FORMULAS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.moeca.grouped_linear: _grouped_flops,
    torch.ops.moeca.grouped_experts: _program_flops,
}


def count_costs(aten: AtenGraph, plan: CachePlan, options: Options) -> Costs:
    """Costs per layer (FLOPs per row), of all outside the rows, and of a forecast step."""
    inputs = {n: n.meta["val"] for n in aten.placeholders}
    # Numbers of rows that the data says are symbols that no graph is made of here.
    forget = aten.fake_mode.shape_env.ignore_fresh_unbacked_symbols()
    with aten.fake_mode, forget, torch.no_grad(), _counter() as whole:
        variant_outputs(aten.gm, plan, options, "plain", inputs, VariantInputs({}))
    layers = [_layer_cost(aten, plan, layer) for layer in plan.layers]
    counted = (replace(c, branches=0) if c.open_ended else c for c in layers)
    fixed = whole.get_total_flops() - sum(layer.full_flops for layer in counted)
    forecast = _count_forecast(aten, plan, options)
    return Costs(tuple(layers), max(0, round(fixed)), forecast)


def _count_forecast(aten: AtenGraph, plan: CachePlan, options: Options) -> int:
    """FLOPs of a forecast step: everything but what attention and experts would have cost."""
    if "forecast" not in plan.variants:
        return 0
    inputs = {n: n.meta["val"] for n in aten.placeholders}
    with aten.fake_mode, torch.no_grad(), _counter() as counter:
        caches = {
            s.name: torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in plan.layout.specs
        }
        mix = torch.empty(plan.coefficients("forecast"), device=plan.device)
        extra = VariantInputs(caches, mix=mix)
        variant_outputs(aten.gm, plan, options, "forecast", inputs, extra)
    return counter.get_total_flops()


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)


def _layer_cost(aten: AtenGraph, plan: CachePlan, layer: LayerPlan) -> LayerCost:
    roots = [c.root for a in layer.attention for c in a.key_value]
    attention = _row_flops([*roots, *(a.root.root for a in layer.attention)], plan, layer)
    shared = _row_flops([c.root for c in layer.shared], plan, layer)
    branch = _branch_flops(aten, layer)
    sizes = (layer.tokens, layer.branches, layer.region.open_ended)
    return LayerCost(layer.region.name, branch, attention, shared, *sizes)


def _row_flops(roots: list[RowRoot], plan: CachePlan, layer: LayerPlan) -> float:
    """FLOPs per token of computing the roots, what they share counted once."""
    if not roots:
        return 0.0
    available = set(plan.needed) - {r.node for r in roots}
    with _counter() as counter:
        space = layer.region.space
        dry_pull(roots, available, space, rows=space.tokens, every_op=True)
    return counter.get_total_flops() / layer.tokens


def _branch_flops(aten: AtenGraph, layer: LayerPlan) -> float:
    region, rows = layer.region, 7
    body, _, _, params = region.routed.args[:4]
    values = cast(Sequence[Any], torch.fx.map_arg(params, lambda n: n.meta["val"]))
    with aten.fake_mode, torch.no_grad(), _counter() as counter:
        inputs = [_some_rows(r.meta["val"], layer.tokens, rows) for r in region.rows]
        device = region.rows[0].meta["val"].device
        groups = SortedRows(
            torch.zeros(region.num_experts, dtype=torch.int64, device=device),
            torch.zeros(rows, dtype=torch.int64, device=device),
        )
        graph = getattr(aten.gm, str(body.target))  # type: ignore[union-attr]
        ExpertRows(graph, inputs, [per_expert(p) for p in values], groups).run()
    return counter.get_total_flops() / rows


def _some_rows(value: Tensor, tokens: int, rows: int) -> Tensor:
    return value.new_empty(rows, value.numel() // tokens)
