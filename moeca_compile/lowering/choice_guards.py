"""The guard where experts pick tokens: which places are computed, and which cached row each uses.

Ordinary tensor code, inlined where a variant is traced. R places, branch b = token * E + expert in
each; the cache holds R rows, row i that of branch slot_ids[i].

    places, gates [R] + cached rows -> computed [R] in the order of the places, at [R] cached row
"""

from __future__ import annotations

import torch
from torch import Tensor

from .guards import EPS, FIRST, normalize_scores, select_by_budget


def chosen_mask(places: Tensor, valid: Tensor | None, tokens: int, experts: int) -> Tensor:
    """[T, E]: which experts picked which tokens."""
    picked = torch.ones_like(places, dtype=torch.bool) if valid is None else valid
    none = torch.zeros(tokens * experts, dtype=torch.bool, device=places.device)
    return none.scatter(0, places, picked).reshape(tokens, experts)


def match_places(places: Tensor, valid: Tensor | None, slot_ids: Tensor, branches: int) -> Tensor:
    """The cached row of each place's branch [R], -1 for a branch without. branches: T * E."""
    rows = torch.arange(slot_ids.shape[0], device=places.device)
    held = torch.where(slot_ids >= 0, slot_ids, branches)
    row_of = torch.full((branches + 1,), -1, dtype=rows.dtype, device=places.device)
    row_of = row_of.scatter(0, held, rows).narrow(0, 0, branches)
    row = row_of.index_select(0, places)
    return row if valid is None else torch.where(valid, row, -1)


def gate_shares(weights: Tensor, valid: Tensor | None, tokens: int, groups: int) -> Tensor:
    """|gate| [R] scaled so that the gates of a group add up to one for each of its tokens.

    A token has any number of gates, so they are not scaled token by token: a token that is hardly
    chosen weighs little. weights: group by group, see `Groups.split`.
    """
    size = weights.float().abs()
    size = size if valid is None else torch.where(valid, size, 0.0)
    total = size.reshape(groups, -1).sum(1, keepdim=True).clamp(min=EPS)
    return (size.reshape(groups, -1) * (tokens // groups) / total).reshape(-1)


def guard_places(
    share: Tensor,
    matched: Tensor,
    valid: Tensor | None,
    old_share: Tensor,
    norm: Tensor,
    norm_share: Tensor,
    drift: Tensor,
    limits: Tensor,
    groups: int,
    count: int | None,
    score: str,
    lambda_drift: float,
    lambda_share: float,
) -> Tensor:
    """computed [R]; all per place, group by group. limits: tau_e of the place's expert.

    count: places of each group to compute under a budget (None: the threshold rule); where only
    some places are `valid`, the same share of these. norm_share: of the token's cached norms.
    """
    if score == "input_drift":
        scores = share * norm * drift
    elif score == "given":
        scores = drift
    else:
        scores = share + lambda_drift * (share - old_share).abs() + lambda_share * norm_share
    scores = normalize_scores(scores, matched, groups)
    picked = torch.ones_like(matched) if valid is None else valid
    if count is None:
        return picked & (~matched | (scores > limits))
    if valid is None:
        return select_by_budget(scores, limits, matched, share, groups, count)
    return _select_valid(scores, limits, matched, share, valid, groups, count)


def _select_valid(
    scores: Tensor,
    limits: Tensor,
    matched: Tensor,
    share: Tensor,
    valid: Tensor,
    groups: int,
    count: int,
) -> Tensor:
    """`select_by_budget` among the n valid ones of P places: ceil(count * n / P), at least 2."""
    relative = (scores / limits.clamp(min=EPS)).clamp(max=FIRST)
    priority = torch.where(matched, relative, FIRST * (1 + share))
    priority = torch.where(valid, priority, -1.0).reshape(groups, -1)
    size = priority.shape[1]
    here = valid.reshape(groups, -1).sum(1, keepdim=True)
    allowed = torch.div(count * here + size - 1, size, rounding_mode="floor").clamp(min=2)
    best = priority.topk(count, 1).indices
    first = torch.arange(count, device=best.device).unsqueeze(0) < allowed
    chosen = torch.zeros_like(priority, dtype=torch.bool).scatter(1, best, first)
    return chosen.reshape(valid.shape) & valid


def place_rows(row: Tensor, matched: Tensor, computed: Tensor) -> Tensor:
    """The cached row of each place from now on: [R], R for a place that has none.

    A branch keeps its row. One that is newly computed takes a row that no branch keeps, ascending.
    """
    size = row.shape[0]
    kept = torch.zeros(size + 1, dtype=torch.bool, device=row.device)
    kept = kept.scatter(0, torch.where(matched, row, size), True).narrow(0, 0, size)
    free = torch.argsort(kept, stable=True)
    new = computed & ~matched
    rank = (new.to(torch.int64).cumsum(0) - 1).clamp(min=0)
    return torch.where(matched, row, torch.where(new, free.index_select(0, rank), size))
