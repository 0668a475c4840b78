"""The selection rules of the reference: slot alignment, thresholds, scores, choice. Plain loops.

T = B * N tokens in sample-major order, K slots, E experts; everything float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-12


@dataclass(frozen=True)
class Aligned:
    """Current branches in slot order, all [T, K]; a cached branch stays in its slot."""

    ids: Tensor
    weights: Tensor
    matched: Tensor


@dataclass(frozen=True)
class Choice:
    """computed and near, bool, in the shape of what was chosen from.

    near: so close to the edge of the rule that rounding may decide the other way.
    """

    computed: Tensor
    near: Tensor


def align_slots(slot_ids: Tensor, ids: Tensor, weights: Tensor) -> Aligned:
    """Put every current branch of `ids [T, K]` into the slot that caches it, or into a free one.

    Free slots are those no current branch matches; they are taken ascending, in order of k.
    """
    out_ids, out_weights = torch.empty_like(ids), torch.empty_like(weights)
    matched = torch.zeros_like(ids, dtype=torch.bool)
    for token, (cached, current) in enumerate(zip(slot_ids.tolist(), ids.tolist())):
        free = [j for j, expert in enumerate(cached) if expert not in current]
        for k, expert in enumerate(current):
            slot = cached.index(expert) if expert in cached else free.pop(0)
            out_ids[token, slot] = expert
            out_weights[token, slot] = weights[token, k]
            matched[token, slot] = expert in cached
    return Aligned(out_ids, out_weights, matched)


def token_share(weights: Tensor) -> Tensor:
    """|w| / sum_k |w| per token: [T, K]."""
    size = weights.abs()
    return size / size.sum(1, keepdim=True).clamp_min(TINY)


def relative_drift(now: Tensor, then: Tensor) -> Tensor:
    """||now - then|| / max(||then||, 1e-12) over the last dim."""
    return (now - then).norm(dim=-1) / then.norm(dim=-1).clamp_min(TINY)


def small_values(v: Tensor) -> Tensor:
    """1 - |v| / max |v| of the sample, |v| over all heads: v [B, N, G, d] -> [B, N]."""
    size = v.flatten(2).norm(dim=-1)
    return 1.0 - size / size.amax(1, keepdim=True).clamp_min(TINY)


def with_bonus(score: Tensor) -> Tensor:
    """0.4 more for the best of every four tokens in a row: [B, N]."""
    out = score.clone()
    for sample, values in enumerate(score.tolist()):
        for start in range(0, len(values), 4):
            cell = values[start : start + 4]
            for i, value in enumerate(cell):
                out[sample, start + i] += 0.4 if value == max(cell) else 0.0
    return out


def update_usage(usage: Tensor, ids: Tensor, beta: float) -> Tensor:
    """C <- beta C + (1 - beta) mean over samples of [expert e chosen at position n]; C [E, N]."""
    experts, positions = usage.shape
    chosen = torch.zeros_like(usage)
    for token, experts_of_token in enumerate(ids.tolist()):
        for expert in experts_of_token:
            chosen[expert, token % positions] += 1.0
    samples = ids.shape[0] // positions
    return beta * usage + (1.0 - beta) * chosen / samples


def entropy_thresholds(usage: Tensor, tau: float, alpha: float) -> Tensor:
    """tau_e = tau (1 + alpha (2 H_e - 1)), H_e the spatial entropy, [0, 1] within the layer."""
    raw = []
    for row in usage:
        p = row / row.sum().clamp_min(TINY)
        raw.append(-sum(v * math.log(v) for v in p.tolist() if v > 0.0))
    low, high = min(raw), max(raw)
    if high - low < TINY:
        scaled = [0.5] * len(raw)
    else:
        scaled = [(value - low) / (high - low) for value in raw]
    return usage.new_tensor([tau * (1.0 + alpha * (2.0 * h - 1.0)) for h in scaled])


def normalise_scores(raw: Tensor, matched: Tensor, samples: int) -> Tensor:
    """Divide by the largest matched score of the same sample; unmatched branches score zero."""
    scores = torch.where(matched, raw, 0.0).view(samples, -1)
    top = scores.amax(1, keepdim=True)
    return (scores / torch.where(top < TINY, 1.0, top)).view_as(raw)


def choose_by_threshold(
    scores: Tensor, aligned: Aligned, tau_e: Tensor, tolerance: float
) -> Choice:
    """Computed when unmatched, or when the score exceeds the expert's threshold; all [T, K]."""
    threshold = tau_e[aligned.ids]
    near = aligned.matched & ((scores - threshold).abs() <= tolerance)
    return Choice(~aligned.matched | (scores > threshold), near)


def choose_by_budget(
    scores: Tensor,
    aligned: Aligned,
    tau_e: Tensor,
    budget: float,
    samples: int,
    tolerance: float,
) -> Choice:
    """The ceil(budget N K) branches of each sample that come first.

    Unmatched ones come first, larger router share before smaller; then by score / tau_e.
    """
    share = token_share(aligned.weights)
    value = torch.where(aligned.matched, scores / tau_e[aligned.ids], share)
    rank_class = (~aligned.matched).double()  # 1: unmatched, first
    shape = (samples, -1)
    per_sample = value.view(shape).shape[1]
    count = allowance(budget, per_sample)
    picked = top_per_sample(value.view(shape), rank_class.view(shape), count, tolerance)
    return Choice(picked.computed.view_as(scores), picked.near.view_as(scores))


def allowance(budget: float, rows: int) -> int:
    """How many of `rows` a budget allows, at least one."""
    return max(1, math.ceil(budget * rows - 1e-9))


def top_per_sample(value: Tensor, rank_class: Tensor, count: int, tolerance: float) -> Choice:
    """The first `count` of each row of `value [B, M]`: higher class first, then higher value."""
    chosen = torch.zeros_like(value, dtype=torch.bool)
    near = torch.zeros_like(chosen)
    for sample in range(value.shape[0]):
        keys = list(zip(rank_class[sample].tolist(), value[sample].tolist()))
        order = sorted(range(len(keys)), key=lambda i: keys[i], reverse=True)
        chosen[sample, order[:count]] = True
        if count >= len(order):
            continue
        last_in, first_out = keys[order[count - 1]], keys[order[count]]
        for i, key in enumerate(keys):
            edge = first_out if chosen[sample, i] else last_in
            near[sample, i] = key[0] == edge[0] and abs(key[1] - edge[1]) <= tolerance
    return Choice(chosen, near)
