"""Branches of a reuse step where experts pick tokens: a list of places instead of [T, K] slots.

    places [R], gates [R] -> computed [R], row of each place -> experts on the computed ones
    -> cache_write of these rows -> the experts' output: the row of every place, then as written

A branch that is not picked any more is forgotten; its row is free for one that is new. So the cache
always holds what the last step used, and the rows of two steps never have to be in one order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..graph.dataflow import ancestors, descendants
from ..graph.experts import SortedRows, sort_branches
from ..graph.region import ChoiceRegion
from ..lowering.choice_guards import (
    chosen_mask,
    gate_shares,
    guard_places,
    match_places,
    place_rows,
)
from ..lowering.guards import chosen_thresholds
from .attention_first import AttentionFirst
from .reuse_inputs import MIN_ROWS
from .reuse_layer import ReuseLayer, moeca
from .router_first import RouterFirst
from .run_experts import run_experts


class ChoiceLayer(ReuseLayer):
    """Overrides what a `ReuseLayer` does with branches; attention and shared experts stay.

    computed, matched, token, expert: [R], in the order of the places.
    """

    region: ChoiceRegion

    def guard(self, routing: tuple[Tensor, ...], input_drift: Tensor | None) -> None:
        region, options = self.region, self.options
        self.places, gates = routing[0].reshape(-1), routing[1].reshape(-1)
        self.valid = None if region.valid is None else routing[2].reshape(-1)
        self.token = torch.div(self.places, region.num_experts, rounding_mode="floor")
        self.expert = self.places % region.num_experts
        chosen = chosen_mask(self.places, self.valid, self.layer.tokens, region.num_experts)
        alpha = options.alpha if self.layer.selector.expert_aware else 0.0
        spatial, limits = chosen_thresholds(
            self.cache("spatial"), chosen, options.tau, alpha, options.beta
        )
        moeca.cache_fill(self.cache("spatial"), spatial)
        self.row = match_places(
            self.places, self.valid, self.cache("slot_ids"), self.layer.tokens * region.num_experts
        )
        self.matched = self.row >= 0
        self.share = gates_of(region, gates, self.valid)
        self.computed = self._guarded(input_drift, limits)
        self.at = place_rows(self.row, self.matched, self.computed)

    def _guarded(self, input_drift: Tensor | None, limits: Tensor) -> Tensor:
        """Which places are computed [R]; the guard itself works group by group."""
        region, split = self.region, self.region.chosen.split
        held = self.row.clamp(min=0)
        norms = moeca.cache_read(self.cache("slot_norm"), self.layer.branches)
        slot_ids = self.cache("slot_ids")
        owner = torch.div(slot_ids.clamp(min=0), region.num_experts, rounding_mode="floor")
        total = norms.new_zeros(self.layer.tokens).index_add(
            0, owner, torch.where(slot_ids >= 0, norms, 0.0)
        )
        norm = torch.where(self.matched, norms.index_select(0, held), 0.0)
        norm_share = norm / total.index_select(0, self.token).clamp(min=1e-12)
        drift, selector = torch.zeros_like(norm), self.layer.selector
        if selector.token_score is not None:
            drift = selector.token_score(self).index_select(0, self.token)
        elif input_drift is not None:
            older = self.cache("slot_drift").index_select(0, held)
            drift = input_drift.index_select(0, self.token) + older
        each = (
            self.share,
            self.matched,
            None if self.valid is None else self.valid,
            self.cache("slot_weight").index_select(0, held),
            norm,
            norm_share,
            drift,
            limits.index_select(0, self.expert),
        )
        computed = guard_places(
            *(None if v is None else split(v).reshape(-1) for v in each),  # type: ignore[arg-type]
            groups=region.groups,
            count=self.budget(self.inputs.branches, self.layer.branches, region.groups),
            score=selector.formula,
            lambda_drift=self.options.lambda_drift,
            lambda_share=self.options.lambda_share,
        )
        return region.chosen.join(computed)

    def tokens_computed(self) -> Tensor:
        """[T]: tokens with any computed branch."""
        none = torch.zeros(self.layer.tokens + 1, dtype=torch.bool, device=self.token.device)
        index = torch.where(self.computed, self.token, self.layer.tokens)
        return none.scatter(0, index, True).narrow(0, 0, self.layer.tokens)

    def compute_branches(self, rows: list[Tensor], input_drift: Tensor | None) -> None:
        region, size = self.region, self.layer.branches
        count: Any = self.budget(self.inputs.branches, size, region.groups)
        if count is None or (self.valid is not None and self.reads_sizes):
            count = self.computed.sum().clamp(min=MIN_ROWS).item()
            torch._check(count >= MIN_ROWS)
            torch._check(count <= size)
        else:
            count = count * region.groups
        order, groups = sort_branches(self.expert, region.num_experts, self.computed)
        place = order.narrow(0, 0, count)
        groups = SortedRows(groups.ends, groups.experts.narrow(0, 0, count))
        token = self.token.index_select(0, place)
        out = run_experts(self.evaluator, region, rows, token, groups, self.expected_branches)
        ran = self.computed.index_select(0, place)
        index = torch.where(ran, self.at.index_select(0, place), size)
        moeca.cache_write(self.cache("slot_out"), index, out)
        moeca.cache_write(self.cache("slot_norm"), index, out.float().norm(dim=-1))
        self._update_places(input_drift)
        if input_drift is not None:
            # A token with two computed branches is written twice, with the same row.
            written = torch.where(ran, token, self.layer.tokens)
            for i, r in enumerate(rows):
                moeca.cache_write(self.cache(f"token_in{i}"), written, r.index_select(0, token))

    def _update_places(self, input_drift: Tensor | None) -> None:
        """Branches, gates and drift of all rows, written together."""
        moved = self.tokens_computed()
        self.count_ages(moved)
        on_place = moved.index_select(0, self.token)
        held = self.row.clamp(min=0)
        old = self.cache("slot_weight").index_select(0, held)
        self._fill("slot_weight", torch.where(on_place, self.share, old), 0)
        if input_drift is not None:
            grown = input_drift.index_select(0, self.token) * on_place
            older = self.cache("slot_drift").index_select(0, held) + grown
            self._fill("slot_drift", torch.where(self.computed, 0.0, older), 0)
        self._fill("slot_ids", self.places, -1)

    def _fill(self, field: str, values: Tensor, empty: float) -> None:
        """Values [R] of the places to the places' rows; rows of no place become `empty`."""
        size = self.layer.branches
        fresh = torch.full((size + 1,), empty, dtype=values.dtype, device=values.device)
        moeca.cache_fill(self.cache(field), fresh.scatter(0, self.at, values).narrow(0, 0, size))

    def combine(self) -> None:
        """The combine as written, on one row for each place; zeros for a dropped branch."""
        region, size = self.region, self.layer.branches
        slots = moeca.cache_read(self.cache("slot_out"), size)
        known = self.at < size
        out = slots.index_select(0, torch.where(known, self.at, 0))
        out = out.to(region.routed.meta["val"].dtype)
        changed = {region.routed: torch.where(known.unsqueeze(-1), out, 0)}
        below = ancestors([region.combine], stop=set(changed)) & descendants(region.routed)
        self.evaluator.set(region.combine, self.evaluator.view(changed, below)(region.combine))

    def counted_branches(self) -> dict[str, Tensor]:
        picked = torch.ones_like(self.matched) if self.valid is None else self.valid
        new = picked & ~self.matched
        counted = {
            "branches_computed": self.computed.sum(),
            "unmatched": new.sum(),
            "dropped": (new & ~self.computed).sum(),
        }
        return counted if self.valid is None else {**counted, "branches": picked.sum()}


def gates_of(region: ChoiceRegion, gates: Tensor, valid: Tensor | None) -> Tensor:
    """Scaled gates [R] in the order of the places."""
    chosen = region.chosen
    by_group = chosen.split(gates).reshape(-1)
    mask = None if valid is None else chosen.split(valid).reshape(-1)
    return chosen.join(gate_shares(by_group, mask, region.space.rows, region.groups))


class ChoiceRouterFirst(ChoiceLayer, RouterFirst):
    """The paper's order, experts pick tokens."""


class ChoiceAttentionFirst(ChoiceLayer, AttentionFirst):
    """Attention before routing, experts pick tokens."""
