"""Which tensors a set of regions keeps between steps: names, shapes, bytes, before allocation.

MoE layer "blocks.0.moe", T tokens, K slots, D wide:
    slot_ids [T, K]  slot_weight [T, K]  slot_norm [T * K + 1]  slot_out [T * K + 1, D]
    spatial [E, N]   attn0, key_value0.. [T + 1, W]  shared0 [T + 1, D]
    token_in0 [T + 1, Din]  slot_drift [T, K]        only where the drift is scored
    shared_in0 [T + 1, Din]  shared_norm0 [T + 1]    only where the shared expert picks its own rows
    token_age [T]                                    only where the steps a token was held are
    slot_out.slope, attn0.slope, ..  slot_time [T * K + 1]  attn0.time [T + 1]   forecast rows
Where experts pick tokens, R places take the part of T * K slots: slot_ids [R], slot_out [R + 1, D];
they are held, without slopes.
The row behind the last takes the writes of padding rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from ..graph.region import AttentionRegion, ChoiceRegion, MoERegion, Regions, RowRoot
from ..graph.retrace import AtenGraph
from ..graph.row_cache import RowCache
from ..options import Options
from ..policies import find_policy
from ..policies.protocol import Kind, Stored
from ..runtime.store import CacheLayout, CacheSpec
from .histories import Histories, plan_histories
from .row_forecast import slope_name
from .selectors import SELECTORS, Selector


@dataclass(frozen=True)
class AttentionPlan:
    """Row caches of one attention region; `input` under attention_first: what its rows are made
    from, whose drift chooses them."""

    region: AttentionRegion
    root: RowCache
    key_value: tuple[RowCache, ...]
    input: RowCache | None = None

    @property
    def own_input(self) -> tuple[RowCache, ...]:
        return () if self.input is None else (self.input,)


@dataclass(frozen=True)
class LayerPlan:
    """Everything one MoE layer keeps between steps."""

    region: MoERegion
    prefix: str
    attention: tuple[AttentionPlan, ...]
    shared: tuple[RowCache, ...]
    selector: Selector
    shared_rows: bool  # the shared expert picks its own rows (attention first)
    slopes: bool = False  # rows are extrapolated
    evidence: bool = False  # steps say how wrong reuse gets

    def name(self, field: str) -> str:
        return f"{self.prefix}.{field}"

    @property
    def tracks_drift(self) -> bool:
        """Whether expert inputs are kept, to see how far they have moved."""
        return self.selector.tracks_drift or self.evidence

    @property
    def input_fields(self) -> tuple[str, ...]:
        """Caches of the expert input: when a token's branches, its shared rows, were written."""
        fields = ("token_in", self.tracks_drift), ("shared_in", self.shared_rows)
        return tuple(name for name, wanted in fields if wanted)

    @property
    def shared_norms(self) -> tuple[str, ...]:
        """Caches of the shared outputs' norms, where the shared expert picks its own rows."""
        return tuple(f"shared_norm{i}" for i in range(len(self.shared) * self.shared_rows))

    @property
    def slot_times(self) -> str:
        """The tensor that says when each branch was written; "" where branches are held."""
        slots = self.slopes and not isinstance(self.region, ChoiceRegion)
        return self.name("slot_time") if slots else ""

    @property
    def times(self) -> tuple[str, ...]:
        """All tensors of the layer that say when rows were written."""
        found = {a.root.times: None for a in self.attention}
        found |= {c.times: None for c in self.shared}
        return tuple(name for name in (*found, self.slot_times) if name)

    @property
    def roots(self) -> frozenset[Node]:
        """Nodes whose rows are read from a cache in a reuse step."""
        attention = {a.root.root.node for a in self.attention}
        return frozenset(attention | {c.root.node for c in self.shared})

    @property
    def tokens(self) -> int:
        return self.region.space.rows

    @property
    def branches(self) -> int:
        return self.region.branches


@dataclass(frozen=True)
class CachePlan:
    """All layers and the layout of one lane's tensors."""

    layers: tuple[LayerPlan, ...]
    layout: CacheLayout
    needed: frozenset[Node]  # nodes that a reuse step evaluates on all rows
    stored: Stored = field(default_factory=lambda: Stored(rows=True))
    histories: Histories = field(default_factory=Histories)
    left_out: tuple[MoERegion, ...] = ()  # beyond max_cache_bytes, computed as written

    @property
    def variants(self) -> frozenset[Kind]:
        """What can run between two refreshes."""
        possible: dict[Kind, bool] = {
            "reuse": self.stored.rows and bool(self.layers),
            "forecast": bool(self.histories.layers),
            "skip": bool(self.histories.outputs),
        }
        return frozenset(kind for kind, found in possible.items() if found)

    def measures(self, variant: str) -> bool:
        """Whether a variant returns numbers for the policy, as its last output."""
        outputs = bool(self.histories.outputs) and variant == "refresh"
        evidence = any(layer.evidence for layer in self.layers)
        return outputs or (evidence and variant in ("refresh", "reuse"))

    def coefficients(self, variant: str) -> int:
        """How many numbers of the policy a variant takes: the rows' clock, then the mix."""
        clock = CLOCK if self.stored.slopes and variant in ("refresh", "reuse") else 0
        return clock + self.histories.coefficients(variant)

    @property
    def counted(self) -> frozenset[str]:
        """Variants whose graph returns counts: of full steps too where only the data has them."""
        full = any(layer.region.open_ended for layer in self.layers)
        return frozenset({"reuse"} | ({"plain", "refresh"} if full else set()))

    @property
    def device(self) -> torch.device:
        """Where the caches live."""
        return self.layout.specs[0].device

    @property
    def scratch(self) -> frozenset[str]:
        """Tensors with a row for padding behind their last row."""
        return frozenset(s.name for s in self.layout.specs if s.kind in ROW_KINDS)


ROW_KINDS = ("branch", "norm", "attention", "key_value", "shared", "input", "slope", "time")
CLOCK = 2  # numbers: where the step lies, and whether earlier rows mean anything


def plan_cache(regions: Regions, aten: AtenGraph, options: Options) -> CachePlan:
    """Plan what the policy reads: rows of all MoE layers, outputs of layers and of the model."""
    stored = find_policy(options.policy).stores(options)
    layers = tuple(_plan_layer(r, i, options, stored) for i, r in enumerate(regions.moe))
    specs = [s for layer in layers for s in row_specs(layer, options)] if stored.rows else []
    histories = plan_histories(regions, aten, stored)
    layout = CacheLayout([*specs, *histories.specs])
    return CachePlan(layers, layout, regions.needed, stored, histories)


def plan_nothing(regions: Regions) -> CachePlan:
    """The plan of a graph that runs as written in every step."""
    return CachePlan((), CacheLayout(()), regions.needed, Stored())


def _plan_layer(region: MoERegion, number: int, options: Options, stored: Stored) -> LayerPlan:
    prefix = f"{number}.{region.name}"

    def cache(name: str, root: RowRoot, written: str = "") -> RowCache:
        times = f"{prefix}.{written}.time" if stored.slopes and written else ""
        return RowCache(f"{prefix}.{name}", root, region.space, times)

    own_rows = options.order == "attention_first"
    attention = tuple(
        AttentionPlan(
            a,
            cache(f"attention{i}", a.root, f"attention{i}"),
            tuple(cache(f"attention{i}.kv{j}", r) for j, r in enumerate(a.key_value)),
            cache(f"attention{i}.input", a.stream or a.input) if own_rows else None,
        )
        for i, a in enumerate(region.attention)
    )
    shared = tuple(cache(f"shared{i}", r, "shared") for i, r in enumerate(region.shared))
    selector = SELECTORS[find_policy(options.policy).selector(options)]
    return LayerPlan(
        region, prefix, attention, shared, selector, own_rows and bool(shared),
        stored.slopes, stored.evidence and not isinstance(region, ChoiceRegion),
    )  # fmt: skip


def row_specs(layer: LayerPlan, options: Options) -> list[CacheSpec]:
    """Everything a layer keeps, the rows in `cache_dtype`; norms and times stay in float32."""
    if options.cache_dtype is None:
        return _specs(layer)
    dtype = getattr(torch, options.cache_dtype)
    rows = set(ROW_KINDS) - {"norm", "time"}
    return [replace(s, dtype=dtype) if s.kind in rows else s for s in _specs(layer)]


def _specs(layer: LayerPlan) -> list[CacheSpec]:
    region = layer.region
    device, tokens = _val(region.routed).device, layer.tokens

    def spec(field: str, shape: tuple[int, ...], dtype: torch.dtype, kind: str, fill: float = 0):
        return CacheSpec(layer.name(field), shape, dtype, device, kind, fill)

    out, branches = _val(region.routed), layer.branches
    slots = (branches,) if isinstance(region, ChoiceRegion) else (tokens, region.top_k)
    specs = [
        spec("slot_ids", slots, _val(region.ids).dtype, "slot", -1),
        spec("slot_weight", slots, torch.float32, "slot"),
        spec("slot_norm", (branches + 1,), torch.float32, "norm"),
        spec("slot_out", (branches + 1, out.shape[-1]), out.dtype, "branch"),
        spec("spatial", (region.num_experts, region.space.tokens), torch.float32, "spatial"),
    ]
    if layer.tracks_drift:
        specs.append(spec("slot_drift", slots, torch.float32, "slot"))
    for name in layer.shared_norms:
        specs.append(spec(name, (tokens + 1,), torch.float32, "norm"))
    if layer.selector.counts_age:
        specs.append(spec("token_age", (tokens,), torch.float32, "slot"))
    for name in layer.input_fields:
        for i, rows in enumerate(region.rows):
            width = _val(rows).numel() // tokens
            specs.append(spec(f"{name}{i}", (tokens + 1, width), _val(rows).dtype, "input"))
    for plan in layer.attention:
        specs.append(_row_spec(plan.root, "attention"))
        if plan.input is not None:
            specs.append(_row_spec(plan.input, "input"))
        specs += [_row_spec(c, "key_value") for c in plan.key_value]
    specs += [_row_spec(c, "shared") for c in layer.shared]
    return specs if not layer.slopes else _with_slopes(layer, specs)


def _with_slopes(layer: LayerPlan, specs: list[CacheSpec]) -> list[CacheSpec]:
    """Slopes in front, times behind: Inductor writes mutated inputs back in their order, after
    everything else, and a slope is made of the row and the time that were there before.

    Keys and values have none: only the few computed rows read them, and extrapolating them gained
    nothing (passes/README.md)."""
    rows = {a.root.name: a.root.times for a in layer.attention}
    rows |= {c.name: c.times for c in layer.shared}
    if layer.slot_times:
        rows[layer.name("slot_out")] = layer.slot_times
    kept = [s for s in specs if s.name in rows]
    slopes = [CacheSpec(slope_name(s.name), s.shape, s.dtype, s.device, "slope") for s in kept]
    counts = {rows[s.name]: s for s in kept}
    times = [CacheSpec(n, s.shape[:1], torch.float32, s.device, "time") for n, s in counts.items()]
    return [*slopes, *specs, *times]


def _row_spec(cache: RowCache, kind: str) -> CacheSpec:
    value = _val(cache.root.node)
    shape = (cache.space.rows + 1, cache.width)
    return CacheSpec(cache.name, shape, value.dtype, value.device, kind)


def _val(node: Node) -> torch.Tensor:
    return node.meta["val"]
