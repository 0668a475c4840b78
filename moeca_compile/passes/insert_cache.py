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
extra outputs.
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
from ..graph.region import ChoiceRegion
from ..graph.repeats import parts_of_inputs
from ..graph.row_cache import RowCache
from ..options import Options
from ..torch_compat import Trace
from .attention_first import AttentionFirst
from .cache_plan import CLOCK, CachePlan, LayerPlan
from .choice_layer import ChoiceAttentionFirst, ChoiceRouterFirst
from .choice_refresh import compute_all, count_chosen
from .copied_layers import CopiedLayers, taken_by_blocks
from .evidence import average, reuse_evidence
from .forecast import (
    finish_refresh,
    hold_layers,
    keep_layers,
    probe_input,
    skip_outputs,
    update_layers,
)
from .reuse_inputs import ReuseInputs
from .reuse_layer import ReuseLayer
from .router_first import RouterFirst
from .row_forecast import CachedRows, Clock
from .slot_refresh import compute_slots

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

    counts: CPU int64 [layers, 3] under a budget, what `allowed_counts` says; or the same numbers.
    mix: float32 [n], what the policy mixes stored values by (`Policy.mix`). clock: of rows that are
    extrapolated.
    """

    caches: dict[str, Tensor]
    counts: Tensor | list[list[int]] | None = None
    mix: Tensor | None = None
    clock: Clock | None = None

    @classmethod
    def of(
        cls,
        plan: CachePlan,
        caches: dict[str, Tensor],
        counts: Tensor | list[list[int]] | None,
        mix: Tensor | None,
    ) -> VariantInputs:
        """mix: as the policy gives it, a clock in front where rows are extrapolated."""
        if mix is None or not plan.stored.slopes:
            return cls(caches, counts, mix)
        return cls(caches, counts, mix[CLOCK:], Clock(mix[0], mix[1]))

    @property
    def rows(self) -> CachedRows:
        return CachedRows(self.caches, self.clock)


def variant_outputs(
    gm: GraphModule,
    plan: CachePlan,
    options: Options,
    variant: str,
    inputs: dict[Node, Any],
    extra: VariantInputs,
) -> tuple[list[Any], tuple[Tensor, ...]]:
    """(the model's outputs, what a step counts and measures), evaluated under tracing.

    reuse, and full steps in `plan.counted`: counts, int64 [layers, fields]. Behind them: refresh
    with stored outputs, float32 [basis * basis]; refresh and reuse with evidence, float32 [3].
    probe: no outputs, float32 [1].
    """
    if variant == "skip":
        return skip_outputs(plan.histories, inputs, extra.caches, _mix(extra)), ()
    evaluator = Evaluator(gm, inputs)
    if variant == "probe":
        return [], (probe_input(plan.histories, evaluator, extra.caches),)
    evidence: list[Tensor] = []
    stores: dict[Node, Callable[[], None]] = {}
    reuse = _install(evaluator, plan, options, variant, extra, evidence, stores)

    def trace_layer(number: int) -> tuple[Tensor, ...]:
        """What the layer adds to the graph; its counters, in a reuse step, and its evidence."""
        end, before = plan.layers[number].region.combine, len(evidence)
        evaluator.value(end)
        if end in stores:
            stores[end]()
        if not reuse:
            return tuple(evidence[before:])
        found = reuse[number].counters()
        return (found, reuse_evidence(reuse[number])) if plan.layers[number].evidence else (found,)

    # A layer that picks its own part of an input does then what the next one does.
    for node in parts_of_inputs(list(gm.graph.nodes)):
        evaluator.value(node)
    # Layer by layer, so that the recursion never gets deeper than one layer.
    trace = Trace.current()
    taken = taken_by_blocks(gm, plan, whole=not reuse)
    copied = CopiedLayers(evaluator, plan, options, extra, reuse, trace) if trace else None
    numbers = {layer.region.combine: i for i, layer in enumerate(plan.layers)}
    left_out = {region.combine for region in plan.left_out}
    found: dict[int, tuple[Tensor, ...]] = {}
    for node in gm.graph.nodes:
        if node in numbers:
            number = numbers[node]
            for each in taken.get(node, ()):
                evaluator.value(each)
            build = partial(trace_layer, number)
            found[number] = copied.build(number, build) if copied else build()
        elif node in left_out:
            evaluator.value(node)
    by_layer = [found[i] for i in range(len(plan.layers))]
    outputs = [evaluator.value(n) for n in gm.graph.output_node().args[0]]  # type: ignore[union-attr]
    if variant == "refresh":
        for times in (name for layer in plan.layers for name in layer.times):
            extra.rows.stamp_all(times)
    counts = [count_chosen(evaluator, plan)] if variant in plan.counted - {"reuse"} else []
    if variant == "refresh" and plan.histories.outputs:
        outputs, measure = finish_refresh(
            plan.histories, inputs, extra.caches, _mix(extra), outputs
        )
        return outputs, (*counts, measure)
    if variant == "reuse":
        update_layers(plan.histories, evaluator, extra.caches)
        counts = [torch.stack([counters for counters, *_ in by_layer])]
    evidence = [each for found in by_layer for each in found[len(reuse) > 0 :]]
    return outputs, (*counts, average(evidence)) if evidence else tuple(counts)


def _mix(extra: VariantInputs) -> Tensor:
    if extra.mix is None:
        raise ValueError("variant: expected the policy's coefficients, got none")
    return extra.mix


def _install(
    evaluator: Evaluator,
    plan: CachePlan,
    options: Options,
    variant: str,
    extra: VariantInputs,
    evidence: list[Tensor],
    stores: dict[Node, Callable[[], None]],
) -> list[ReuseLayer]:
    """Replace what the variant does not compute as written; the reuse layers, where it has any.

    evidence: takes what a refresh finds as the graph is evaluated. stores: takes what is to be
    stored, to be called behind the node.
    """
    reuse: list[ReuseLayer] = []
    if variant == "forecast":
        hold_layers(plan.histories, evaluator, extra.caches, _mix(extra))
        return reuse
    for number, layer in enumerate(plan.layers):
        if variant == "reuse":
            counts = (None, None, None) if extra.counts is None else extra.counts[number]
            inputs = ReuseInputs(extra.rows, *counts)
            reuse.append(_reuse_layer(evaluator, layer, options, inputs, plan.needed))
            reuse[-1].install()
        else:
            rows = extra.rows if variant == "refresh" and plan.stored.rows else None
            _install_full(evaluator, layer, options, rows, evidence, stores)
    if variant == "refresh":
        keep_layers(plan.histories, evaluator, extra.caches)
    return reuse


def _reuse_layer(
    evaluator: Evaluator,
    layer: LayerPlan,
    options: Options,
    inputs: ReuseInputs,
    needed: frozenset[Node],
) -> ReuseLayer:
    orders = CHOICE_ORDERS if isinstance(layer.region, ChoiceRegion) else ORDERS
    order = orders[options.order]
    return order(evaluator, layer, options, inputs, needed)


def _install_full(
    evaluator: Evaluator,
    layer: LayerPlan,
    options: Options,
    rows: CachedRows | None,
    evidence: list[Tensor],
    stores: dict[Node, Callable[[], None]],
) -> None:
    """Every row is computed; with `rows` every row is also stored.

    What lies around the branches is stored behind them: wherever its values come from, layers then
    look alike and are compiled once (graph/repeats.py).
    """
    region = layer.region
    if isinstance(region, ChoiceRegion):
        evaluator.replace(
            region.routed, lambda: compute_all(evaluator, layer, options, rows and rows.caches)
        )
    else:
        evaluator.replace(
            region.routed, lambda: compute_slots(evaluator, layer, options, rows, evidence)
        )
    if rows is None:
        return

    acts: dict[Node, list[Callable[[Tensor], None]]] = {}
    for attention in layer.attention:
        for cache in (attention.root, *attention.key_value, *attention.own_input):
            acts.setdefault(cache.root.node, []).append(partial(_fill_rows, rows, cache))
    for number, cache in enumerate(layer.shared):
        norms = [rows.caches[layer.name(n)] for n in layer.shared_norms[number : number + 1]]
        store = partial(_fill_rows, rows, cache, norms=norms)
        acts.setdefault(cache.root.node, []).append(store)
    stores[region.combine] = partial(_store, evaluator, acts)


def _store(evaluator: Evaluator, acts: dict[Node, list[Callable[[Tensor], None]]]) -> None:
    for node, actions in acts.items():
        value = evaluator.value(node)
        with set_current_meta(node):
            for act in actions:
                act(value)


def _fill_rows(
    cached: CachedRows, cache: RowCache, value: Tensor, norms: Sequence[Tensor] = ()
) -> None:
    """Store all rows of a value, and where asked for their norms [T]."""
    rows = cache.to_rows(value)
    cached.fill(cache.name, cache.times, rows)
    for norm in norms:
        moeca.cache_fill(norm, rows.float().norm(dim=-1))
