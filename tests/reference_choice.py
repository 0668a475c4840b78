"""The method where experts pick tokens, in plain eager float64: `reference.py` on [T, E] tables.

A branch is a pair (token, expert). `chosen [T, E]` says which branches a step has, `cached [T, E]`
which of them have an output from an earlier step. A chosen branch that is cached may be reused, one
that is not is computed; a cached one that is not chosen any more is forgotten.

    ref = ChoiceReference(model, options)
    ref.step(x, t, y, refresh=True)
    later = ref.step(x, t, y, refresh=False, forced=[Forced(pairs, attended, shared)])

pooled: experts pick from the whole batch, so scores and budget are of the batch, not of a sample.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference_layer import Attended, choose_tokens, stored_rows, write_attention
from reference_options import MethodOptions
from reference_rows import Rows
from reference_select import (
    TINY,
    entropy_thresholds,
    normalise_scores,
    relative_drift,
    top_per_sample,
)
from reference_state import Forced, LayerCall, Pairs, pairs_of
from reference_views import IdiomModelView, View


@dataclass(frozen=True)
class ChoiceState:
    """What a layer keeps between steps; every table is [T, E], zero where nothing is cached."""

    cached: Tensor
    share: Tensor  # scaled gate when the token's branches were last written
    norm: Tensor
    drift: Tensor
    out: Tensor  # [T, E, D]
    token_in: Tensor  # [T, Din]
    shared_in: Tensor
    attn_in: Tensor
    rows: dict[str, Rows]  # shared [T, D], attn [B, N, D], k, v as read


@dataclass(frozen=True)
class ChoiceRecord:
    """What a layer did. disputed: forced against own choice, near ties left out."""

    chosen: Tensor
    matched: Tensor
    computed: Tensor
    disputed: Pairs
    disputed_tokens: set[int]
    usage: Tensor
    state: ChoiceState


@dataclass(frozen=True)
class ChoiceStep:
    output: Tensor
    layers: list[ChoiceRecord]

    @property
    def disputed(self) -> list[Pairs]:
        return [layer.disputed for layer in self.layers]


class ChoiceReference:
    """Float64 copy of a model with expert choice, run step by step; view: how to take it apart."""

    def __init__(
        self, model: nn.Module, options: MethodOptions, pooled: bool, view: View = IdiomModelView
    ) -> None:
        self.options, self.pooled, self.tolerance = options, pooled, 1e-6
        self.view = view(copy.deepcopy(model).double())
        self._states: dict[int, ChoiceRecord] = {}

    @torch.no_grad()
    def step(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        refresh: bool,
        forced: Sequence[Forced] | None = None,
    ) -> ChoiceStep:
        h, c = self.view.embed(x.double(), t, y)
        layers = []
        for index, block in enumerate(self.view.blocks):
            before = self._states.get(index)
            usage = h.new_zeros(block.num_experts, h.shape[1]) if before is None else before.usage
            given = None if forced is None else forced[index]
            now = float(t.flatten()[0])
            call = LayerCall(block, h, c, self.options, self.tolerance, usage, given, now)
            layer = ChoiceLayer(call, 1 if self.pooled else h.shape[0])
            if refresh or before is None:
                h, record = layer.refresh(None if before is None else before.state)
            else:
                h, record = layer.reuse(before.state)
            self._states[index] = record
            layers.append(record)
        return ChoiceStep(self.view.finish(h, c), layers)


class ChoiceLayer:
    """One call of one layer. groups: parts of the batch with a scale and a budget of their own."""

    def __init__(self, call: LayerCall, groups: int) -> None:
        self.call, self.block, self.options, self.groups = call, call.block, call.options, groups

    def picks(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """chosen and weights [T, E] for the experts' input u [T, D]."""
        return self.block.picks(u.view(*self.call.x.shape[:2], -1))  # type: ignore[attr-defined]

    def experts(self, u: Tensor) -> Tensor:
        """[T, E, D]"""
        each = [self.block.expert(e, u) for e in range(self.block.num_experts)]
        return torch.stack(each, 1)

    def shares(self, weights: Tensor) -> Tensor:
        """|w| scaled so that a group has one for each of its tokens."""
        size = weights.abs().reshape(self.groups, -1)
        tokens = weights.shape[0] // self.groups
        return (size * tokens / size.sum(1, keepdim=True).clamp_min(TINY)).view_as(weights)

    def used(self, chosen: Tensor) -> Tensor:
        """C [E, N] after a step that chose `chosen [T, E]`."""
        per_sample = chosen.double().view(self.call.samples, -1, chosen.shape[1])
        beta = self.options.beta
        return beta * self.call.usage + (1 - beta) * per_sample.mean(0).t()

    def refresh(self, old: ChoiceState | None) -> tuple[Tensor, ChoiceRecord]:
        call, block = self.call, self.block
        a = block.attention_input(call.x, call.c)
        q, k, v = block.heads(a)
        attn = block.attend(q, k, v)
        h = block.add_attention(call.x, attn, call.c)
        u = block.expert_input(h, call.c)
        chosen, weights = self.picks(u)
        out = torch.where(chosen[..., None], self.experts(u), 0.0)
        shared = block.shared(u)
        state = ChoiceState(
            cached=chosen,
            share=self.shares(weights),
            norm=out.norm(dim=-1),
            drift=torch.zeros_like(weights),
            out=out,
            token_in=u,
            shared_in=u,
            attn_in=call.x,
            rows=stored_rows(call, old, None, {"shared": shared, "attn": attn, "k": k, "v": v}),
        )
        none = torch.zeros_like(chosen)
        record = ChoiceRecord(chosen, none, chosen, set(), set(), self.used(chosen), state)
        moe = (out * weights[..., None]).sum(1) + shared
        return block.add_experts(h, moe, call.c), record

    def reuse(self, old: ChoiceState) -> tuple[Tensor, ChoiceRecord]:
        call, block, budget = self.call, self.block, self.options.budget
        if self.options.order == "router_first":
            stale = old.rows["attn"].at(call.now)
            u0 = block.expert_input(block.add_attention(call.x, stale, call.c), call.c)
            decided = self.decide(old, u0)
            tokens = decided.computed.any(1)
            attended = write_attention(call, old, tokens)  # type: ignore[arg-type]
            h = block.add_attention(call.x, attended.attn.at(call.now), call.c)
            u = block.expert_input(h, call.c)
            return self.finish(old, attended, decided, h, u, tokens, set())
        assert budget is not None and call.forced is not None
        moved = relative_drift(call.x, old.attn_in)
        tokens, disputed_a = choose_tokens(call, moved, budget, call.forced.attended)
        attended = write_attention(call, old, tokens)  # type: ignore[arg-type]
        h = block.add_attention(call.x, attended.attn.at(call.now), call.c)
        u = block.expert_input(h, call.c)
        decided = self.decide(old, u)
        moved = relative_drift(u, old.shared_in) * old.rows["shared"].value.norm(dim=-1)
        shared_tokens, disputed_s = choose_tokens(
            call, moved.view(call.samples, -1), budget, call.forced.shared
        )
        disputed = disputed_a | disputed_s
        return self.finish(old, attended, decided, h, u, shared_tokens, disputed)

    def decide(self, old: ChoiceState, u0: Tensor) -> Decided:
        """Which branches are chosen, matched and computed when the experts' input is u0."""
        call, options = self.call, self.options
        chosen, weights = self.picks(u0)
        usage = self.used(chosen)
        limits = entropy_thresholds(usage, options.tau, options.alpha)
        matched = chosen & old.cached
        share = self.shares(weights)
        if options.score == "input_drift":
            moved = relative_drift(u0, old.token_in).unsqueeze(1) + old.drift
            raw = share * old.norm * moved
        else:
            norm_share = old.norm / old.norm.sum(1, keepdim=True).clamp_min(TINY)
            raw = share + options.lambda_drift * (share - old.share).abs()
            raw = raw + options.lambda_share * norm_share
        scores = normalise_scores(raw, matched, self.groups)
        if options.budget is None:
            computed = chosen & (~matched | (scores > limits))
            near = matched & ((scores - limits).abs() <= call.tolerance)
        else:
            value = torch.where(matched, scores / limits, share)
            computed, near = self.by_budget(value, matched, chosen, options.budget)
        if call.forced is None:
            return Decided(chosen, weights, matched, share, computed, set(), usage)
        names = torch.arange(chosen.shape[1]).expand_as(chosen)
        wanted = torch.zeros_like(chosen)
        for token, expert in call.forced.computed:
            wanted[token, expert] = True
        disputed = pairs_of(names, computed ^ wanted) - pairs_of(names, near)
        return Decided(chosen, weights, matched, share, wanted, disputed, usage)

    def by_budget(
        self, value: Tensor, matched: Tensor, chosen: Tensor, budget: float
    ) -> tuple[Tensor, Tensor]:
        """Of each group's n chosen branches the ceil(budget n) first: unmatched, then by value.

        Where n depends on the data the budget is first rounded up to whole branches of all T E.
        """
        computed, near = torch.zeros_like(chosen), torch.zeros_like(chosen)
        size = chosen.shape[0] // self.groups
        for group in range(self.groups):
            part = slice(group * size, (group + 1) * size)
            mask = chosen[part]
            n = int(mask.sum())
            allowed = max(2, math.ceil(budget * n - 1e-9))
            if self.groups == 1:
                whole = max(2, math.ceil(budget * mask.numel() - 1e-9))
                allowed = max(2, math.ceil(whole * n / mask.numel()))
            values, ranks = value[part][mask][None], (~matched[part][mask]).double()[None]
            picked = top_per_sample(values, ranks, min(allowed, n), self.call.tolerance)
            computed[part] = mask.masked_scatter(mask, picked.computed)
            near[part] = mask.masked_scatter(mask, picked.near)
        return computed, near

    def finish(
        self,
        old: ChoiceState,
        attended: Attended,
        decided: Decided,
        h: Tensor,
        u: Tensor,
        shared_tokens: Tensor,
        disputed_tokens: set[int],
    ) -> tuple[Tensor, ChoiceRecord]:
        """Compute, write, combine. A dropped branch gives nothing and is not cached."""
        call, block, computed = self.call, self.block, decided.computed
        cached = decided.chosen & (decided.matched | computed)
        tokens = computed.any(1, keepdim=True)
        fresh = self.experts(u)
        out = torch.where(computed[..., None], fresh, old.out)
        shared = old.rows["shared"].updated(shared_tokens, block.shared(u), call.now)
        older = old.drift + relative_drift(u, old.token_in).unsqueeze(1) * tokens
        state = ChoiceState(
            cached=cached,
            share=torch.where(cached, torch.where(tokens, decided.share, old.share), 0.0),
            norm=torch.where(cached, torch.where(computed, fresh.norm(dim=-1), old.norm), 0.0),
            drift=torch.where(cached & ~computed, older, 0.0),
            out=torch.where(cached[..., None], out, 0.0),
            token_in=torch.where(tokens, u, old.token_in),
            shared_in=torch.where(shared_tokens[:, None], u, old.shared_in),
            attn_in=attended.attn_in,
            rows={"shared": shared, "attn": attended.attn, "k": attended.k, "v": attended.v},
        )
        moe = (state.out * decided.weights[..., None]).sum(1) + shared.at(call.now)
        record = ChoiceRecord(
            decided.chosen,
            decided.matched,
            computed,
            decided.disputed,
            disputed_tokens,
            decided.usage,
            state,
        )
        return block.add_experts(h, moe, self.call.c), record


@dataclass(frozen=True)
class Decided:
    """Tables [T, E] of a reuse step before anything is computed."""

    chosen: Tensor
    weights: Tensor
    matched: Tensor
    share: Tensor
    computed: Tensor
    disputed: Pairs
    usage: Tensor
