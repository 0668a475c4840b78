"""The expert-aware guard: which branches of a layer are computed in a reuse step.

Semantics of `moeca::expert_thresholds` and `moeca::guard_branches` as ordinary tensor code; the
lowering inlines it so that Inductor fuses it. T tokens, K slots, E experts, B samples (method:
MoECa, arXiv 2606.15615, score and expert-aware threshold).

    router ids, weights [T, K] + cached slots -> computed [T, K] in slot order, tokens [T]
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-12
FIRST = 1e30  # above every score / threshold, and finite in float32 and bfloat16


def expert_thresholds(
    spatial: Tensor, ids: Tensor, tau: float, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """New spatial statistic C [E, N] and thresholds tau_e [E].

    spatial: C of the last step [E, N]; ids: [T, K], T = samples * N. Experts chosen in few places
    (low entropy over positions) get a lower threshold, so they are recomputed more.
    """
    names = torch.arange(spatial.shape[0], device=ids.device, dtype=ids.dtype)
    chosen = (ids.unsqueeze(-1) == names).any(1)
    return chosen_thresholds(spatial, chosen, tau, alpha, beta)


def chosen_thresholds(
    spatial: Tensor, chosen: Tensor, tau: float, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """The same from `chosen [T, E]`: which experts each token goes to."""
    experts, positions = spatial.shape
    share = chosen.to(spatial.dtype).reshape(-1, positions, experts).mean(0).t()
    updated = beta * spatial + (1 - beta) * share
    p = updated / updated.sum(1, keepdim=True).clamp(min=EPS)
    entropy = -(p * p.clamp(min=EPS).log()).sum(1)
    low, high = entropy.amin(), entropy.amax()
    spread = high - low
    # Equal entropies differ by rounding; stretched to [0, 1] that would decide the thresholds.
    noise = max(EPS, 32 * torch.finfo(entropy.dtype).eps) * high.clamp(min=1.0)
    relative = torch.where(spread <= noise, 0.5, (entropy - low) / spread.clamp(min=EPS))
    return updated, tau * (1 + alpha * (2 * relative - 1))


def assign_slots(ids: Tensor, slot_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(assign [T, K, K], matched [T, K]): branch k of a token -> the slot it lives in.

    A branch goes to the slot that holds its expert; the others take the free slots in order.
    """
    same = ids.unsqueeze(2) == slot_ids.unsqueeze(1)  # [T, k, slot]
    branch_known, slot_kept = same.any(2), same.any(1)
    branch_rank, slot_rank = _ranks(~branch_known), _ranks(~slot_kept)
    new = (branch_rank.unsqueeze(2) == slot_rank.unsqueeze(1)) & ~branch_known.unsqueeze(2)
    return same | (new & ~slot_kept.unsqueeze(1)), slot_kept


def _ranks(flags: Tensor) -> Tensor:
    """How many of `flags [T, K]` are set up to and with each.

    A cumulative sum, but with K comparisons each: they are fused with what is around them, where a
    scan is a kernel of its own and cuts that in two.
    """
    places = torch.arange(flags.shape[1], device=flags.device)
    up_to = places.unsqueeze(0) <= places.unsqueeze(1)
    return (flags.unsqueeze(1) & up_to).sum(2)


def to_slots(assign: Tensor, values: Tensor) -> Tensor:
    """Per-branch `values [T, K]` (router order) in slot order [T, K]."""
    return (assign.to(values.dtype) * values.unsqueeze(2)).sum(1)


def paper_scores(
    share: Tensor, slot_weight: Tensor, slot_norm: Tensor, lambda_drift: float, lambda_share: float
) -> Tensor:
    """The paper's score s [T, K] in slot order: weight + l1 * weight drift + l2 * norm share.

    share: |w| / sum |w| per token, slot_weight: the same when the branch was cached.
    """
    norm_share = slot_norm / slot_norm.sum(1, keepdim=True).clamp(min=EPS)
    moved = (share - slot_weight).abs()
    return share + lambda_drift * moved + lambda_share * norm_share


def normalize_scores(scores: Tensor, matched: Tensor, samples: int) -> Tensor:
    """Scores relative to the largest matched one of the same sample: one tau fits all layers."""
    known = torch.where(matched, scores, 0.0).reshape(samples, -1)
    top = known.amax(1, keepdim=True)
    top = torch.where(top < EPS, 1.0, top)
    return (scores.reshape(samples, -1) / top).reshape(scores.shape)


def select_by_budget(
    scores: Tensor, limits: Tensor, matched: Tensor, share: Tensor, samples: int, count: int
) -> Tensor:
    """computed [T, K]: per sample the `count` branches of highest priority, unmatched ones first.

    Priority of a matched branch is score / tau_e, so the expert-aware thresholds still count.
    """
    relative = scores / limits.clamp(min=EPS)
    # Unmatched branches first. Scaled, not shifted: floating point then keeps both orders.
    priority = torch.where(matched, relative.clamp(max=FIRST), FIRST * (1 + share))
    flat = priority.reshape(samples, -1)
    chosen = flat.topk(count, 1).indices
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter(1, chosen, True)
    return mask.reshape(scores.shape)


def score_branches(
    share: Tensor,
    matched: Tensor,
    slot_weight: Tensor,
    slot_norm: Tensor,
    drift: Tensor,
    samples: int,
    score: str,
    lambda_drift: float,
    lambda_share: float,
) -> Tensor:
    """Score [T, K] in slot order as it is compared with tau_e; see `guard_branches`."""
    if score == "input_drift":
        scores = share * slot_norm * drift
    elif score == "given":
        scores = drift
    else:
        scores = paper_scores(share, slot_weight, slot_norm, lambda_drift, lambda_share)
    return normalize_scores(scores, matched, samples)


def guard_branches(
    ids: Tensor,
    weights: Tensor,
    slot_ids: Tensor,
    slot_weight: Tensor,
    slot_norm: Tensor,
    drift: Tensor,
    thresholds: Tensor,
    samples: int,
    count: int | None,
    score: str,
    lambda_drift: float,
    lambda_share: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(computed, ids, weights, share, matched), all [T, K] in slot order.

    count: branches per sample under a budget (None: the threshold rule). score: "moeca" (paper)
    or "input_drift" (share x cached output norm x relative drift [T, K] of the expert's input) or
    "given" (what is in the place of the drift is the score).
    weights: current router weights, zero for a branch dropped because the budget was full of
    unmatched ones.
    """
    assign, matched = assign_slots(ids, slot_ids)
    now = to_slots(assign, ids)
    current = to_slots(assign, weights)
    magnitude = current.float().abs()
    share = magnitude / magnitude.sum(1, keepdim=True).clamp(min=EPS)
    scores = score_branches(
        share, matched, slot_weight, slot_norm, drift, samples, score, lambda_drift, lambda_share
    )
    limits = thresholds[now]
    if count is None:
        computed = ~matched | (scores > limits)
    else:
        computed = select_by_budget(scores, limits, matched, share, samples, count)
    kept = computed | matched
    return computed, now, torch.where(kept, current, 0), share, matched
