"""One MoE layer of a reuse step: route, guard, attend, compute the selected rows, read the rest.

    router on the cached attention -> ids, w [T, K]                 (order "router_first", the paper)
    guard_branches                 -> computed [T, K], tokens S = any computed branch
    K, V, attention rows of S      -> cache_write; the root becomes cache_read
    selected branches, shared rows -> cache_write; combine reads all slots with current weights

Semantics: method step by step in `tests/reference.py`, which judges this file in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.traceback import set_current_meta

from ..graph.dataflow import ancestors, descendants
from ..graph.evaluate import Evaluator
from ..graph.experts import sort_branches
from ..graph.layout import Selection
from ..graph.pull import RowPuller
from ..graph.row_cache import RowCache, padded_index
from ..options import Options
from ..runtime.telemetry import FIELDS
from .cache_plan import AttentionPlan, LayerPlan
from .run_experts import run_experts

moeca = torch.ops.moeca
MIN_ROWS = 2  # Inductor specialises sizes 0 and 1: fewer rows are padded, padding is not stored


class ReuseLayer:
    """Builds one layer of the reuse variant under tracing."""

    def __init__(
        self,
        evaluator: Evaluator,
        layer: LayerPlan,
        options: Options,
        caches: dict[str, Tensor],
        count: Tensor | None,
        needed: frozenset[Node],
    ):
        self.evaluator = evaluator
        self.needed = needed
        self.layer = layer
        self.region = layer.region
        self.options = options
        self.caches = caches
        self.count = count
        self._roots = {a.root.root.node for a in layer.attention} | {
            c.root.node for c in layer.shared
        }
        self._counters: Tensor | None = None

    def install(self) -> None:
        """Replace the region's roots; the first one that is needed builds the layer's routing."""
        for attention in self.layer.attention:
            self.evaluator.replace(attention.root.root.node, self._route)
        self.evaluator.replace(self.region.ids, self._route)
        self.evaluator.replace(self.region.weights, self._route)
        self.evaluator.replace(self.region.combine, self._combine)

    def counters(self) -> Tensor:
        """int64 [fields], in the order of telemetry.FIELDS, counted from what ran."""
        assert self._counters is not None
        return self._counters

    def _cache(self, field: str) -> Tensor:
        return self.caches[self.layer.name(field)]

    def _read(self, cache: RowCache) -> Tensor:
        rows = moeca.cache_read(self.caches[cache.name], self.layer.tokens)
        return cache.from_rows(rows)

    # -- routing ---------------------------------------------------------------------------------

    def _route(self) -> None:
        # From here on these are nodes like any other, on the cached attention.
        self.evaluator.restore(self.region.ids)
        self.evaluator.restore(self.region.weights)
        with set_current_meta(self.region.routed):
            self._route_first()

    def _route_first(self) -> None:
        stale = self._stale_view()
        shape = (self.layer.tokens, self.region.top_k)
        ids = stale(self.region.ids)
        weights = stale(self.region.weights)
        inputs = [stale(r).reshape(self.layer.tokens, -1) for r in self.region.rows]
        self._guard(ids.reshape(shape), weights.reshape(shape), inputs)
        tokens = self.computed.any(1).reshape(self.region.space.samples, -1)
        self._select_tokens(tokens)
        for attention in self.layer.attention:
            self._attend(attention)
        self.evaluator.set(self.region.ids, ids)
        self.evaluator.set(self.region.weights, weights)

    def _stale_view(self) -> Any:
        """The graph with attention as cached, read before anything is written in this step."""
        changed = {a.root.root.node: self._read(a.root) for a in self.layer.attention}
        below: set[Node] = set()
        for root in changed:
            below |= descendants(root)
        wanted = [self.region.ids, self.region.weights, *self.region.rows]
        below &= ancestors(wanted, stop=set(changed))
        return self.evaluator.view(changed, below)

    def _guard(self, ids: Tensor, weights: Tensor, inputs: list[Tensor]) -> None:
        options = self.options
        spatial, limits = moeca.expert_thresholds(
            self._cache("spatial"), ids, options.tau, options.alpha, options.beta
        )
        moeca.cache_fill(self._cache("spatial"), spatial)
        slot_norm = moeca.cache_read(self._cache("slot_norm"), self.layer.branches)
        slot_weight = self._cache("slot_weight")
        drift = torch.zeros_like(slot_weight)
        if self.layer.tracks_drift:
            drift = self._drift(inputs).unsqueeze(1) + self._cache("slot_drift")
        self.computed, self.now, self.slot_weights, self.share, self.matched = moeca.guard_branches(
            ids,
            weights,
            self._cache("slot_ids"),
            slot_weight,
            slot_norm.reshape(slot_weight.shape),
            drift,
            limits,
            self.region.space.samples,
            self._budget(),
            options.score,
            options.lambda_drift,
            options.lambda_share,
        )

    def _budget(self) -> Any:
        """Branches per sample under a budget, a size known only at run time."""
        if self.count is None:
            return None
        count: Any = self.count.item()
        torch._check(count >= MIN_ROWS)
        torch._check(count <= self.layer.branches // self.region.space.samples)
        return count

    def _drift(self, inputs: list[Tensor]) -> Tensor:
        """Relative change [T] of the expert input since the token was last written."""
        total = None
        for i, now in enumerate(inputs):
            then = moeca.cache_read(self._cache(f"token_in{i}"), self.layer.tokens).float()
            moved = (now.float() - then).norm(dim=-1) / then.norm(dim=-1).clamp(min=1e-12)
            total = moved if total is None else total + moved
        assert total is not None
        return total

    # -- rows ------------------------------------------------------------------------------------

    def _select_tokens(self, chosen: Tensor) -> None:
        """Selection of the tokens in `chosen [B, N]`, padded per sample to the fullest sample."""
        space = self.region.space
        count: Any = chosen.sum(1).amax().clamp(min=MIN_ROWS).item()
        torch._check(count >= MIN_ROWS)
        torch._check(count <= space.tokens)
        valid, token = chosen.to(torch.float32).topk(count, 1)
        base = torch.arange(space.samples, device=chosen.device).unsqueeze(1) * space.tokens
        flat = (base + token).reshape(-1)
        self.selection = Selection(space, flat, count, per_sample=True)
        self.write_index = padded_index(self.selection, valid > 0)
        self.tokens = chosen.reshape(-1)

    def _puller(self) -> RowPuller:
        """Rows of the selected tokens. Values outside the regions are there in full anyway."""
        outside = self.needed - self._roots
        return RowPuller(self.selection, self.evaluator.value, outside.__contains__)

    def _attend(self, attention: AttentionPlan) -> None:
        """Recompute K, V and the output of the selected tokens; the caches then hold every row."""
        puller = self._puller()
        for cache in (*attention.key_value, attention.root):
            root = cache.root
            with set_current_meta(root.node):
                fresh = cache.to_rows(puller.pull(root.node, root.layout), self.selection)
                moeca.cache_write(self.caches[cache.name], self.write_index, fresh)
                self.evaluator.set(root.node, self._read(cache))

    def _combine(self) -> None:
        with set_current_meta(self.region.routed):
            self.evaluator.value(self.region.weights)  # routes, if nothing has asked for it yet
            rows = [self.evaluator.value(r).reshape(self.layer.tokens, -1) for r in self.region.rows]
            self._compute_branches(rows)
            self._compute_shared()
            self._update_slots(rows)
            self._count()
            slots = moeca.cache_read(self._cache("slot_out"), self.layer.branches)
            self._evaluate_combine(slots.reshape(*self.computed.shape, -1))

    def _compute_branches(self, rows: list[Tensor]) -> None:
        region, flat = self.region, self.computed.reshape(-1)
        if self.count is None:
            count: Any = flat.sum().clamp(min=MIN_ROWS).item()
            torch._check(count >= MIN_ROWS)
            torch._check(count <= self.layer.branches)
        else:
            count = self._budget() * region.space.samples
        order, groups = sort_branches(self.now.reshape(-1), region.num_experts, flat)
        branch = order.narrow(0, 0, count)
        groups = type(groups)(groups.ends, groups.experts.narrow(0, 0, count))
        token = torch.div(branch, region.top_k, rounding_mode="floor")
        out = run_experts(self.evaluator, region, [r.index_select(0, token) for r in rows], groups)
        index = torch.where(flat[branch], branch, self.layer.branches)
        moeca.cache_write(self._cache("slot_out"), index, out)
        moeca.cache_write(self._cache("slot_norm"), index, out.float().norm(dim=-1))

    def _compute_shared(self) -> None:
        puller = self._puller()
        for cache in self.layer.shared:
            root = cache.root
            with set_current_meta(root.node):
                fresh = cache.to_rows(puller.pull(root.node, root.layout), self.selection)
                moeca.cache_write(self.caches[cache.name], self.write_index, fresh)
                self.evaluator.set(root.node, self._read(cache))

    def _update_slots(self, rows: list[Tensor]) -> None:
        """Ids, weights, drift and inputs of every token with a computed branch, written together."""
        moved = self.tokens.unsqueeze(1)
        slot_ids, slot_weight = self._cache("slot_ids"), self._cache("slot_weight")
        moeca.cache_fill(slot_weight, torch.where(moved, self.share, slot_weight))
        moeca.cache_fill(slot_ids, torch.where(self.computed, self.now, slot_ids))
        if not self.layer.tracks_drift:
            return
        older = self._cache("slot_drift") + self._drift(rows).unsqueeze(1) * moved
        moeca.cache_fill(self._cache("slot_drift"), torch.where(self.computed, 0.0, older))
        for i, r in enumerate(rows):
            picked = r.index_select(0, self.selection.flat)
            moeca.cache_write(self._cache(f"token_in{i}"), self.write_index, picked)

    def _evaluate_combine(self, slots: Tensor) -> None:
        """The combine as written, on slot order: it sums over the slots, their order is free."""
        region = self.region
        weights = self.slot_weights.reshape(region.weights.meta["val"].shape)
        changed = {region.routed: slots, region.weights: weights}
        below = ancestors([region.combine], stop=set(changed)) & (
            descendants(region.routed) | descendants(region.weights)
        )
        value = self.evaluator.view(changed, below)(region.combine)
        self.evaluator.set(region.combine, value)

    def _count(self) -> None:
        dropped = ~self.matched & ~self.computed
        attended = self.tokens.sum()
        zero = torch.zeros_like(attended)
        run = self.selection.count * self.region.space.samples
        values = {
            "branches_computed": self.computed.sum(),
            "tokens_attended": attended if self.layer.attention else zero,
            "unmatched": (~self.matched).sum(),
            "dropped": dropped.sum(),
            "shared_rows": attended if self.layer.shared else zero,
            "rows_run": zero + run,
        }
        self._counters = torch.stack([values[name] for name in FIELDS])
