"""One layer of the reference: a refresh step, and a reuse step in either order.

    refresh:          attention, router, experts, shared: all computed, all stored
    router first:     router on the cached attention -> branches -> attention, experts, shared of
                      the tokens that have a computed branch
    attention first:  attention of the most drifted tokens -> router -> branches; shared experts
                      of the most drifted tokens

Functions return the new state instead of writing into the old one, so a caller may keep both. Both
orders in one file: they are to be read against each other and share every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reference_rows import Rows, cached_slots
from reference_select import (
    Aligned,
    Choice,
    align_slots,
    allowance,
    choose_by_budget,
    choose_by_threshold,
    entropy_thresholds,
    normalise_scores,
    relative_drift,
    small_values,
    token_share,
    top_per_sample,
    update_usage,
    with_bonus,
)
from reference_state import Forced, LayerCall, LayerState, Pairs, ReferenceLayer, pairs_of


@dataclass(frozen=True)
class Attended:
    """Attention caches after their rows were written; shapes as in `LayerState`."""

    attn: Rows
    attn_in: Tensor
    k: Rows
    v: Rows


def refresh_layer(call: LayerCall, old: LayerState | None = None) -> tuple[Tensor, ReferenceLayer]:
    """Everything as the model has it, all of it stored. Returns (x after the block, record).

    old: rows of the same generation, where there are any: they give the slopes.
    """
    block = call.block
    a = block.attention_input(call.x, call.c)
    q, k, v = block.heads(a)
    attn = block.attend(q, k, v)
    h = block.add_attention(call.x, attn, call.c)
    u = block.expert_input(h, call.c)
    weights, ids = block.route(u)
    out = call.experts(u, ids)
    shared = block.shared(u)
    usage = update_usage(call.usage, ids, call.options.beta)
    state = LayerState(
        slot_ids=ids,
        slot_weight=token_share(weights),
        slot_norm=out.norm(dim=-1),
        slot_drift=torch.zeros_like(weights),
        slot_out=out,
        token_in=u,
        token_age=torch.zeros_like(weights[:, 0]),
        shared=shared,
        shared_in=u,
        attn=attn,
        attn_in=call.x,
        k=k,
        v=v,
        rows=stored_rows(
            call, old, ids, {"slot_out": out, "shared": shared, "attn": attn, "k": k, "v": v}
        ),
    )
    everything = torch.ones_like(ids, dtype=torch.bool)
    nothing = torch.zeros_like(everything)
    record = ReferenceLayer(
        ids=ids,
        weights=weights,
        matched=nothing,
        scores=torch.zeros_like(weights),
        tau_e=entropy_thresholds(usage, call.options.tau, call.options.alpha),
        computed=everything,
        dropped=nothing,
        near=nothing,
        tokens_attended=everything[:, 0],
        tokens_shared=everything[:, 0],
        disputed=set(),
        disputed_tokens=set(),
        usage=usage,
        state=state,
    )
    moe = (out * weights.unsqueeze(-1)).sum(1) + shared
    return block.add_experts(h, moe, call.c), record


def stored_rows(
    call: LayerCall, old: Any, ids: Tensor | None, fresh: dict[str, Tensor]
) -> dict[str, Rows]:
    """All rows written; a branch has a slope if its expert was cached, in whatever slot.

    old: a state with `rows`, or None.
    """
    result = {}
    for name, value in fresh.items():
        order = call.forecast_order
        if name in ("k", "v"):  # always held
            value, order = value.transpose(1, 2), 0  # [B, N, G, d]: rows in front
        lead = 1 if name == "shared" else 2
        result[name] = Rows.new(value, lead, call.now, order)
        if old is not None and old.rows:
            rows, same = old.rows[name], None
            if name == "slot_out":
                assert ids is not None
                slot, same = cached_slots(old.slot_ids, ids)
                rows = rows.picked(slot)
            everything = torch.ones_like(rows.time, dtype=torch.bool)
            result[name] = rows.updated(everything, value, call.now, same)
    return result


def reuse_router_first(call: LayerCall, old: LayerState) -> tuple[Tensor, ReferenceLayer]:
    """The router sees the cached attention; tokens with a computed branch get fresh attention."""
    block = call.block
    stale = old.rows["attn"].at(call.now)
    u0 = block.expert_input(block.add_attention(call.x, stale, call.c), call.c)
    decided = decide(call, old, u0)
    tokens = decided.computed.any(1)
    attended = write_attention(call, old, tokens)
    h = block.add_attention(call.x, attended.attn.at(call.now), call.c)
    u1 = block.expert_input(h, call.c)
    moe, record = write_branches(call, old, attended, decided, u1, tokens, tokens, set())
    return block.add_experts(h, moe, call.c), record


def reuse_attention_first(call: LayerCall, old: LayerState) -> tuple[Tensor, ReferenceLayer]:
    """Attention chooses tokens by the drift of the stream it reads, shared experts by that of
    their input times their output's size; budget rule only."""
    block, budget = call.block, call.options.budget
    if budget is None:
        raise ValueError("attention first needs a budget")
    forced = call.forced or Forced(set())
    attended_tokens, disputed_a = choose_tokens(
        call, relative_drift(call.x, old.attn_in), budget, forced.attended
    )
    attended = write_attention(call, old, attended_tokens)
    h = block.add_attention(call.x, attended.attn.at(call.now), call.c)
    u = block.expert_input(h, call.c)
    decided = decide(call, old, u, attended.v)
    drift = relative_drift(u, old.shared_in) * old.rows["shared"].value.norm(dim=-1)
    shared_tokens, disputed_s = choose_tokens(
        call, drift.view(call.samples, -1), budget, forced.shared
    )
    moe, record = write_branches(
        call, old, attended, decided, u, attended_tokens, shared_tokens, disputed_a | disputed_s
    )
    return block.add_experts(h, moe, call.c), record


@dataclass(frozen=True)
class Decided:
    """The branches of a reuse step, before anything is computed; [T, K] in slot order."""

    aligned: Aligned
    scores: Tensor
    tau_e: Tensor
    computed: Tensor
    near: Tensor
    disputed: Pairs
    usage: Tensor


def decide(call: LayerCall, old: LayerState, u0: Tensor, v: Rows | None = None) -> Decided:
    """Route `u0 [T, Din]`, align with the cache, score, choose; forced choices are judged here.

    v: values as cached when the router speaks, those of before this step where none are given.
    """
    options = call.options
    weights, ids = call.block.route(u0)
    aligned = align_slots(old.slot_ids, ids, weights)
    usage = update_usage(call.usage, ids, options.beta)
    token_wise = call.score in ("value_norm", "toca")
    tau_e = entropy_thresholds(usage, options.tau, 0.0 if token_wise else options.alpha)
    scores = raw_scores(call, old, aligned, u0, old.rows["v"] if v is None else v)
    scores = normalise_scores(scores, aligned.matched, call.samples)
    if options.budget is None:
        own = choose_by_threshold(scores, aligned, tau_e, call.tolerance)
    else:
        own = choose_by_budget(scores, aligned, tau_e, options.budget, call.samples, call.tolerance)
    computed, disputed = judge(aligned.ids, own, call.forced)
    return Decided(aligned, scores, tau_e, computed, own.near, disputed, usage)


def raw_scores(call: LayerCall, old: LayerState, aligned: Aligned, u0: Tensor, v: Rows) -> Tensor:
    """Score of every slot before layer normalisation: [T, K]; ValueError for an unknown score."""
    options = call.options
    share = token_share(aligned.weights)
    if call.score == "value_norm":
        return small_values(v.value).reshape(-1, 1).expand_as(share)
    if call.score == "toca":
        stale = 0.0625 * old.token_age.view(call.samples, -1)
        return with_bonus(small_values(v.value) + stale).reshape(-1, 1).expand_as(share)
    if call.score == "moeca":
        norm_share = old.slot_norm / old.slot_norm.sum(1, keepdim=True).clamp_min(1e-12)
        weight_drift = (share - old.slot_weight).abs()
        return share + options.lambda_drift * weight_drift + options.lambda_share * norm_share
    if call.score == "input_drift":
        drift = relative_drift(u0, old.token_in).unsqueeze(1) + old.slot_drift
        return share * old.slot_norm * drift
    raise ValueError(f"unknown score {call.score!r}")


def judge(ids: Tensor, own: Choice, forced: Forced | None) -> tuple[Tensor, Pairs]:
    """The mask to run, and the pairs on which a forced selection and the own one really differ."""
    if forced is None:
        return own.computed, set()
    wanted = [[(t, e) in forced.computed for e in row] for t, row in enumerate(ids.tolist())]
    computed = torch.tensor(wanted, dtype=torch.bool)
    differing = pairs_of(ids, own.computed) ^ forced.computed
    return computed, differing - pairs_of(ids, own.near)


def choose_tokens(
    call: LayerCall, value: Tensor, budget: float, forced: set[int] | None
) -> tuple[Tensor, set[int]]:
    """The ceil(budget N) tokens of each sample with the largest `value [B, N]`, as a mask [T].

    Second: tokens on which a forced choice and the own one really differ.
    """
    count = allowance(budget, value.shape[1])
    own = top_per_sample(value, torch.zeros_like(value), count, call.tolerance)
    mask, near = own.computed.flatten(), own.near.flatten()
    if forced is None:
        return mask, set()
    wanted = torch.zeros_like(mask)
    wanted[sorted(forced)] = True
    return wanted, set(((mask ^ wanted) & ~near).nonzero().flatten().tolist())


def write_attention(call: LayerCall, old: LayerState, tokens: Tensor) -> Attended:
    """Fresh k and v of `tokens [T]` first, then their attention over the partly old cache."""
    a = call.block.attention_input(call.x, call.c)
    q, fresh_k, fresh_v = call.block.heads(a)
    per_token = tokens.view(call.samples, -1)  # [B, N]
    k = old.rows["k"].updated(per_token, fresh_k.transpose(1, 2), call.now)
    v = old.rows["v"].updated(per_token, fresh_v.transpose(1, 2), call.now)
    fresh = call.block.attend(q, k.at(call.now).transpose(1, 2), v.at(call.now).transpose(1, 2))
    attn = old.rows["attn"].updated(per_token, fresh, call.now)
    return Attended(attn, torch.where(per_token[..., None], call.x, old.attn_in), k, v)


def write_branches(
    call: LayerCall,
    old: LayerState,
    attended: Attended,
    decided: Decided,
    u1: Tensor,
    attended_tokens: Tensor,
    shared_tokens: Tensor,
    disputed_tokens: set[int],
) -> tuple[Tensor, ReferenceLayer]:
    """Compute the chosen branches on `u1 [T, Din]`, write the state, combine: (moe [T, D], record).

    A dropped branch contributes nothing; its slot keeps output, id and norm, and its drift grows
    like that of any slot that was not computed.
    """
    aligned, computed = decided.aligned, decided.computed
    dropped = ~aligned.matched & ~computed
    tokens = computed.any(1)
    fresh = call.experts(u1, aligned.ids)
    out = old.rows["slot_out"].updated(computed, fresh, call.now, aligned.matched)
    shared = old.rows["shared"].updated(shared_tokens, call.block.shared(u1), call.now)
    older = old.slot_drift + relative_drift(u1, old.token_in).unsqueeze(1)
    drift = torch.where(tokens[:, None], older, old.slot_drift)
    state = LayerState(
        slot_ids=torch.where(computed, aligned.ids, old.slot_ids),
        slot_weight=torch.where(tokens[:, None], token_share(aligned.weights), old.slot_weight),
        slot_norm=torch.where(computed, fresh.norm(dim=-1), old.slot_norm),
        slot_drift=torch.where(computed, 0.0, drift),
        slot_out=out.value,
        token_in=torch.where(tokens[:, None], u1, old.token_in),
        token_age=torch.where(tokens, 0.0, old.token_age + 1),
        shared=shared.value,
        shared_in=torch.where(shared_tokens[:, None], u1, old.shared_in),
        attn=attended.attn.value,
        attn_in=attended.attn_in,
        k=attended.k.value.transpose(1, 2),
        v=attended.v.value.transpose(1, 2),
        rows={
            "slot_out": out,
            "shared": shared,
            "attn": attended.attn,
            "k": attended.k,
            "v": attended.v,
        },
    )
    served = torch.where(dropped, 0.0, aligned.weights)
    moe = (out.at(call.now) * served.unsqueeze(-1)).sum(1) + shared.at(call.now)
    record = ReferenceLayer(
        ids=aligned.ids,
        weights=aligned.weights,
        matched=aligned.matched,
        scores=decided.scores,
        tau_e=decided.tau_e,
        computed=computed,
        dropped=dropped,
        near=decided.near,
        tokens_attended=attended_tokens,
        tokens_shared=shared_tokens,
        disputed=decided.disputed,
        disputed_tokens=disputed_tokens,
        usage=decided.usage,
        state=state,
    )
    return moe, record
