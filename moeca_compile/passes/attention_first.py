"""Attention before routing: every part picks its own rows, all counts are known beforehand.

    drift of the stream the attention reads -> n tokens per sample -> K, V, attention rows
    router on that stream -> guard -> R branches per sample;  shared expert: its own n tokens

The stream, and not what norm and modulation make of it for the projection: that is made of the
chosen rows only.

No size depends on the data, so nothing waits for the device. With a budget of 1 a reuse step is a
true refresh, which the paper's order is not (its router has seen cached attention).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.traceback import set_current_meta

from .cache_plan import AttentionPlan
from .reuse_layer import ReuseLayer, TokenRows, moeca


class AttentionFirst(ReuseLayer):
    """Needs a budget: a share of the branches and, alike, of the tokens."""

    def install(self) -> None:
        self.put_off_other_streams()
        self.attended: TokenRows | None = None
        for attention in self.layer.attention:
            root = attention.root.root.node
            self.evaluator.replace(root, lambda attention=attention: self._attend(attention))
        self.evaluator.replace(self.region.combine, self._experts)

    def _attend(self, attention: AttentionPlan) -> None:
        cache = attention.input
        assert cache is not None
        with set_current_meta(cache.root.node):
            now = cache.to_rows(self.evaluator.value(cache.root.node))
            rows = self._most_drifted(self.drift(cache.name, now))
            picked = now.index_select(0, rows.selection.flat)
            moeca.cache_write(self.inputs.caches[cache.name], rows.write_index, picked)
        self.attended = rows
        self.refresh_rows((*attention.key_value, attention.root), rows)

    def _most_drifted(self, score: Tensor) -> TokenRows:
        """Per sample the tokens with the largest `score [T]`, as many as the budget allows."""
        space = self.region.space
        count = self.budget(self.inputs.tokens, self.layer.tokens)
        token = score.reshape(space.samples, space.tokens).topk(count, 1).indices
        mask = torch.zeros(
            space.samples, space.tokens, dtype=torch.bool, device=score.device
        ).scatter(1, token, True)
        return self.rows_of(token, torch.ones_like(token, dtype=torch.bool), mask, count)

    def _experts(self) -> None:
        region = self.region
        with set_current_meta(region.routed):
            rows = [self.evaluator.value(r).reshape(self.layer.tokens, -1) for r in region.rows]
            drift = self.input_drift(rows)
            self.guard(tuple(self.evaluator.value(n) for n in region.routing), drift)
            self.compute_branches(rows, drift)
            shared = self._share(rows) if self.layer.shared else None
            self.count(self.attended, shared)
            self.combine()

    def _share(self, rows: list[Tensor]) -> TokenRows:
        """Shared experts of the tokens whose output is large and whose input has moved."""
        drift = self.summed_drift("shared_in", rows)
        norms = [self.cache(field) for field in self.layer.shared_norms]
        size = torch.stack([moeca.cache_read(n, self.layer.tokens) for n in norms]).sum(0)
        chosen = self._most_drifted(drift * size)
        for i, r in enumerate(rows):
            picked = r.index_select(0, chosen.selection.flat)
            moeca.cache_write(self.cache(f"shared_in{i}"), chosen.write_index, picked)
        made = self.refresh_rows(self.layer.shared, chosen)
        for norm, fresh in zip(norms, made, strict=True):
            moeca.cache_write(norm, chosen.write_index, fresh.float().norm(dim=-1))
        return chosen
