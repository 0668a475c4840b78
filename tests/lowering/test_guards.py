"""The guard as tensor code against the reference in plain loops, for random layers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import reference_select as reference
from moeca_compile.lowering import guards

TOLERANCE = 1e-5  # float32 against float64: closer calls than this may go either way
LAMBDA_DRIFT, LAMBDA_SHARE = 1.0, 0.6


@dataclass(frozen=True)
class Layer:
    """One layer's state and the router's current output, float64; T = samples * tokens."""

    samples: int
    experts: int
    ids: Tensor
    weights: Tensor
    slot_ids: Tensor
    slot_weight: Tensor
    slot_norm: Tensor
    drift: Tensor
    spatial: Tensor


def random_layer(seed: int, slots: int, samples: int = 2, tokens: int = 5) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    experts, rows = slots + 3, samples * tokens

    def positive(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.01

    def choose() -> Tensor:
        noise = torch.rand(rows, experts, generator=generator)
        return noise.argsort(1)[:, :slots]

    cached = choose()
    current = choose()
    kept = torch.rand(rows, generator=generator) < 0.6  # most tokens keep their experts
    order = torch.rand(rows, slots, generator=generator).argsort(1)
    current = torch.where(kept.unsqueeze(1), cached.gather(1, order), current)
    return Layer(
        samples=samples,
        experts=experts,
        ids=current,
        weights=positive(rows, slots) * torch.where(current % 3 == 0, -1.0, 1.0),
        slot_ids=cached,
        slot_weight=reference.token_share(positive(rows, slots)),
        slot_norm=positive(rows, slots),
        drift=positive(rows, slots),
        spatial=positive(experts, tokens),
    )


def run(layer: Layer, limits: Tensor, score: str, count: int | None) -> list[Tensor]:
    return list(
        guards.guard_branches(
            layer.ids,
            layer.weights.float(),
            layer.slot_ids,
            layer.slot_weight.float(),
            layer.slot_norm.float(),
            layer.drift.float(),
            limits.float(),
            layer.samples,
            count,
            score,
            LAMBDA_DRIFT,
            LAMBDA_SHARE,
        )
    )


def judged(layer: Layer, limits: Tensor, score: str, budget: float | None):
    """(aligned, choice, share) of the reference."""
    aligned = reference.align_slots(layer.slot_ids, layer.ids, layer.weights)
    share = reference.token_share(aligned.weights)
    if score == "moeca":
        norm = layer.slot_norm / layer.slot_norm.sum(1, keepdim=True)
        raw = share + LAMBDA_DRIFT * (share - layer.slot_weight).abs() + LAMBDA_SHARE * norm
    else:
        raw = share * layer.slot_norm * layer.drift
    scores = reference.normalise_scores(raw, aligned.matched, layer.samples)
    if budget is None:
        choice = reference.choose_by_threshold(scores, aligned, limits, TOLERANCE)
    else:
        choice = reference.choose_by_budget(
            scores, aligned, limits, budget, layer.samples, TOLERANCE
        )
    return aligned, choice, share


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 6, 8])
def test_slots_keep_their_expert(slots: int) -> None:
    for seed in range(5):
        layer = random_layer(seed, slots)
        aligned = reference.align_slots(layer.slot_ids, layer.ids, layer.weights)
        assign, matched = guards.assign_slots(layer.ids, layer.slot_ids)
        assert torch.equal(matched, aligned.matched)
        assert torch.equal(guards.to_slots(assign, layer.ids), aligned.ids)
        assert torch.equal(guards.to_slots(assign, layer.weights), aligned.weights)
        assert (assign.sum(1) == 1).all()  # a permutation of the slots
        assert (assign.sum(2) == 1).all()


def test_every_overlap_of_two_choices() -> None:
    """All pairs of ordered choices of 3 out of 5 experts."""
    choices = torch.tensor(list(itertools.permutations(range(5), 3)))
    pairs = torch.cartesian_prod(torch.arange(len(choices)), torch.arange(len(choices)))
    ids, slot_ids = choices[pairs[:, 0]], choices[pairs[:, 1]]
    aligned = reference.align_slots(slot_ids, ids, ids.double())
    assign, matched = guards.assign_slots(ids, slot_ids)
    assert torch.equal(guards.to_slots(assign, ids), aligned.ids)
    assert torch.equal(matched, aligned.matched)


def test_empty_slots_match_nothing() -> None:
    assign, matched = guards.assign_slots(torch.tensor([[4, 0]]), torch.tensor([[-1, -1]]))
    assert guards.to_slots(assign, torch.tensor([[4, 0]])).tolist() == [[4, 0]]
    assert not matched.any()


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_thresholds_follow_the_reference(slots: int) -> None:
    for seed in range(5):
        layer = random_layer(seed, slots)
        usage = reference.update_usage(layer.spatial, layer.ids, 0.65)
        limits = reference.entropy_thresholds(usage, 0.8, 0.6)
        got = guards.expert_thresholds(layer.spatial, layer.ids, 0.8, 0.6, 0.65)
        torch.testing.assert_close(got[0], usage, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got[1], limits, rtol=1e-9, atol=1e-9)
        single = guards.expert_thresholds(layer.spatial.float(), layer.ids, 0.8, 0.6, 0.65)
        torch.testing.assert_close(single[1].double(), limits, rtol=1e-4, atol=1e-4)


def test_an_expert_never_seen_gets_the_lowest_threshold() -> None:
    ids = torch.tensor([[0], [0], [1], [0]])
    _, limits = guards.expert_thresholds(torch.zeros(3, 4), ids, 0.8, 0.5, 0.65)
    assert limits[2] == limits.min() == pytest.approx(0.4)
    assert limits[0] == limits.max() == pytest.approx(1.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [4, 64, 1000])
def test_equal_entropies_leave_the_threshold_alone(tokens: int, dtype: torch.dtype) -> None:
    """Every expert in as many places as the others, weighted by different rounding."""
    ids = (torch.arange(2 * tokens) % 2).unsqueeze(1)
    spatial = torch.zeros(2, tokens, dtype=dtype)
    for _ in range(7):
        spatial, limits = guards.expert_thresholds(spatial, ids, 0.8, 0.6, 0.65)
        torch.testing.assert_close(limits, torch.full((2,), 0.8, dtype=dtype))
    uneven = torch.rand(1, tokens, generator=torch.Generator().manual_seed(0), dtype=dtype)
    shuffled = torch.cat([uneven, uneven.flip(1), uneven.roll(1, 1)])  # the same up to order
    everyone = torch.arange(3).repeat(tokens, 1)
    _, limits = guards.expert_thresholds(shuffled, everyone, 0.8, 0.6, 1.0)
    torch.testing.assert_close(limits, torch.full((3,), 0.8, dtype=dtype))


@pytest.mark.parametrize("score", ["moeca", "input_drift"])
@pytest.mark.parametrize("budget", [None, 0.05, 0.3, 0.7])
@pytest.mark.parametrize("slots", range(1, 9))
def test_the_same_branches_as_the_reference(slots: int, budget: float | None, score: str) -> None:
    compared = 0
    for seed in range(6):
        layer = random_layer(100 * slots + seed, slots)
        usage = reference.update_usage(layer.spatial, layer.ids, 0.65)
        limits = reference.entropy_thresholds(usage, 0.8, 0.6)
        aligned, choice, share = judged(layer, limits, score, budget)
        per_sample = layer.ids.numel() // layer.samples
        count = None if budget is None else reference.allowance(budget, per_sample)
        computed, now, weights, got_share, matched = run(layer, limits, score, count)
        clear = ~choice.near
        compared += int(clear.sum())
        assert torch.equal(computed[clear], choice.computed[clear])
        assert torch.equal(now, aligned.ids)
        assert torch.equal(matched, aligned.matched)
        torch.testing.assert_close(got_share.double(), share, rtol=1e-5, atol=1e-6)
        dropped = ~aligned.matched & ~choice.computed
        expected = torch.where(dropped, 0.0, aligned.weights)
        torch.testing.assert_close(weights.double()[clear], expected[clear], rtol=1e-6, atol=1e-6)
        if count is not None:
            assert (computed.reshape(layer.samples, -1).sum(1) == count).all()
    assert compared > 40


def test_unmatched_branches_beyond_the_budget_are_dropped_largest_first() -> None:
    layer = random_layer(7, 2, samples=1, tokens=4)
    strangers = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1]])
    shares = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.51, 0.49]])
    parts = guards.guard_branches(
        strangers, shares, strangers + 2, shares, layer.slot_norm.float(), layer.drift.float(),
        torch.ones(layer.experts), 1, 3, "moeca", 1.0, 0.6,
    )  # fmt: skip
    computed, _, weights, _, matched = parts
    assert not matched.any()
    assert computed.tolist() == [[True, False], [True, False], [True, False], [False, False]]
    assert torch.equal(weights, torch.where(computed, shares, 0.0))


def test_shares_of_unmatched_branches_are_told_apart_to_the_last_digits() -> None:
    """Not squeezed by what puts them first."""
    tokens = 64
    share = 0.5 + torch.arange(tokens) * 1e-6
    matched = torch.zeros(tokens, 1, dtype=torch.bool)
    ones = torch.ones(tokens, 1)
    got = guards.select_by_budget(ones, ones, matched, share.unsqueeze(1), 1, 10)
    assert got.flatten().nonzero().flatten().tolist() == list(range(tokens - 10, tokens))


def test_a_threshold_of_zero_still_ranks_by_score() -> None:
    """tau = 0, or alpha = 1 for the most concentrated expert: score / tau_e must not saturate."""
    scores = torch.rand(50, 1, generator=torch.Generator().manual_seed(0))
    matched = torch.ones(50, 1, dtype=torch.bool)
    got = guards.select_by_budget(scores, torch.zeros(50, 1), matched, scores, 1, 7)
    best = scores.flatten().topk(7).indices
    assert sorted(best.tolist()) == got.flatten().nonzero().flatten().tolist()
    got = guards.select_by_budget(scores, torch.full((50, 1), 1e-9), matched, scores, 1, 7)
    assert sorted(best.tolist()) == got.flatten().nonzero().flatten().tolist()


def test_scores_of_nothing_known_stay_finite() -> None:
    scores = torch.zeros(4, 2)
    got = guards.normalize_scores(scores, torch.zeros(4, 2, dtype=torch.bool), 2)
    assert torch.equal(got, scores)


def test_low_precision_router_weights() -> None:
    layer = random_layer(3, 3)
    limits = torch.full((layer.experts,), 0.8)
    out = guards.guard_branches(
        layer.ids, layer.weights.bfloat16(), layer.slot_ids, layer.slot_weight.float(),
        layer.slot_norm.float(), layer.drift.float(), limits, 2, None, "moeca", 1.0, 0.6,
    )  # fmt: skip
    assert out[2].dtype == torch.bfloat16
    assert out[3].dtype == torch.float32
    torch.testing.assert_close(out[3].sum(1), torch.ones(10))
