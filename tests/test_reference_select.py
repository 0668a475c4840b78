"""The selection rules of the reference on numbers small enough to check by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from reference_select import (
    align_slots,
    choose_by_budget,
    entropy_thresholds,
    normalise_scores,
    top_per_sample,
    update_usage,
)


def double(value: object) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_slots_keep_their_expert_and_new_ones_take_free_slots_in_order() -> None:
    slot_ids = torch.tensor([[5, 2, 7]])
    aligned = align_slots(slot_ids, torch.tensor([[1, 7, 3]]), double([[0.5, 0.3, 0.2]]))
    assert aligned.ids.tolist() == [[1, 3, 7]]
    assert aligned.weights.tolist() == [[0.5, 0.2, 0.3]]
    assert aligned.matched.tolist() == [[False, False, True]]


def test_usage_is_a_decaying_mean_over_samples() -> None:
    usage = torch.zeros(3, 2, dtype=torch.float64)
    ids = torch.tensor([[0], [1], [0], [2]])  # two samples of two positions
    usage = update_usage(usage, ids, beta=0.5)
    assert usage.tolist() == [[0.5, 0.0], [0.0, 0.25], [0.0, 0.25]]
    usage = update_usage(usage, ids, beta=0.5)
    assert usage.tolist() == [[0.75, 0.0], [0.0, 0.375], [0.0, 0.375]]


def test_entropy_extremes_give_the_extreme_thresholds() -> None:
    usage = double([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0] * 4])
    tau_e = entropy_thresholds(usage, tau=0.8, alpha=0.6)
    expected = [0.8 * 1.6, 0.8 * 0.4, 0.8, 0.8 * 0.4]  # everywhere, one place, half, never seen
    torch.testing.assert_close(tau_e, double(expected))


def test_equal_entropies_leave_the_threshold_alone() -> None:
    usage = double([[1.0, 0.0], [0.0, 3.0]])
    assert entropy_thresholds(usage, tau=0.8, alpha=0.6).tolist() == [0.8, 0.8]


def test_scores_are_normalised_per_sample_over_matched_branches() -> None:
    raw = double([[4.0, 1.0], [9.0, 2.0], [0.0, 0.0], [0.0, 7.0]])  # two samples of two tokens
    matched = torch.tensor([[True, True], [False, True], [True, True], [True, False]])
    scores = normalise_scores(raw, matched, samples=2)
    assert scores.tolist() == [[1.0, 0.25], [0.0, 0.5], [0.0, 0.0], [0.0, 0.0]]


def test_budget_takes_unmatched_branches_first_then_score_over_threshold() -> None:
    slot_ids = torch.tensor([[0, 1], [0, 1]])
    ids = torch.tensor([[0, 1], [2, 1]])
    aligned = align_slots(slot_ids, ids, double([[0.5, 0.5], [0.1, 0.9]]))
    scores = double([[0.9, 0.6], [0.0, 0.5]])
    tau_e = double([0.9, 0.3, 0.1])  # 0.6 / 0.3 beats 0.9 / 0.9
    for budget, expected in (
        (0.25, [[False, False], [True, False]]),
        (0.50, [[False, True], [True, False]]),
        (0.51, [[False, True], [True, True]]),
        (1.00, [[True, True], [True, True]]),
    ):
        choice = choose_by_budget(scores, aligned, tau_e, budget, samples=1, tolerance=1e-6)
        assert choice.computed.tolist() == expected


def test_near_ties_are_those_on_both_sides_of_the_edge() -> None:
    value = double([[0.9, 0.5, 0.5 - 1e-8, 0.1]])
    choice = top_per_sample(value, torch.zeros_like(value), count=2, tolerance=1e-6)
    assert choice.computed.tolist() == [[True, True, False, False]]
    assert choice.near.tolist() == [[False, True, True, False]]
