"""Weights of stored refreshes: exact on polynomials, equal to the published finite differences."""

from __future__ import annotations

import pytest

from moeca_compile.policies.trail import Trail, lagrange_weights


def trail_of(*times: float, depth: int = 4) -> Trail:
    trail = Trail(depth)
    for time in times:
        trail.add(time)
    return trail


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_polynomials_of_the_order_are_met(order: int) -> None:
    times, now = [0.4, 0.55, 0.9, 1.0][: order + 1], 0.3
    for power in range(order + 1):
        weights = lagrange_weights(times, now)
        forecast = sum(w * t**power for w, t in zip(weights, times))
        assert forecast == pytest.approx(now**power, rel=1e-9)


def test_even_steps_give_newtons_differences() -> None:
    # f0 + (f0 - f1) k + (f0 - 2 f1 + f2) k (k + 1) / 2 with k steps of the refreshes' distance
    f, k = [2.0, 1.5, 1.2], 0.5
    weights = trail_of(1.0, 0.8, 0.6).weights(0.6 - 0.2 * k, 2)
    newton = f[0] + (f[0] - f[1]) * k + (f[0] - 2 * f[1] + f[2]) * k * (k + 1) / 2
    assert sum(w * v for w, v in zip(weights, f)) == pytest.approx(newton)


def test_newest_first_and_no_more_than_depth() -> None:
    assert trail_of(1.0, 0.8, 0.6, depth=2).times == [0.6, 0.8]


def test_the_order_grows_with_what_there_is() -> None:
    assert trail_of(1.0).weights(0.5, 2) == [1.0]
    assert trail_of(1.0, 0.8).weights(0.8, 0) == [1.0, 0.0]


def test_a_repeated_time_counts_once() -> None:
    weights = trail_of(1.0, 0.8, 0.8).weights(0.7, 1)
    assert weights[1] == 0.0
    assert weights == pytest.approx([1.5, 0.0, -0.5])


def test_nothing_stored_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one refresh"):
        Trail(2).weights(0.5, 1)
