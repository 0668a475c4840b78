"""Where a schedule ends: what is left of it, and which call is the last one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moeca_compile.options import Options
from moeca_compile.policies.ending import is_last, time_left
from moeca_compile.policies.output_forecast import END_SHARE
from moeca_compile.runtime.controller import Controller
from policies.test_auto import ALL, Sampler, flow, follows


@pytest.mark.parametrize(
    ("before", "now", "highest", "left"),
    [
        (0.9, 0.8, 1.0, 0.8),
        (900.0, 880.0, 999.0, 880.0),
        (0.10, 0.12, 0.10, 0.88),
        (20.0, 40.0, 40.0, 960.0),
        (0.0, 20.0, 0.0, 980.0),  # the first one above 1 is this one
        (980.0, 1020.0, 1020.0, 0.0),
        (-0.1, -0.2, 1.1, math.inf),  # a logarithm
        (0.1, -0.1, 1.1, math.inf),
        (0.5, 0.5, 1.0, math.inf),  # Heun's second call
        (math.inf, 0.5, 0.0, math.inf),  # the first call
    ],
)
def test_time_left(before: float, now: float, highest: float, left: float) -> None:
    assert time_left(before, now, highest) == pytest.approx(left)


@pytest.mark.parametrize(
    "times",
    [
        [1 - i / 50 for i in range(50)],
        [i / 50 for i in range(50)],
        [999 - 20 * i for i in range(50)],
        [20.0 * i for i in range(50)],
        [999 - 10 * i for i in range(100)],
    ],
    ids=["falls", "rises", "falls to 19", "rises to 980", "falls to 9"],
)
def test_the_last_call_of_even_steps(times: list[float]) -> None:
    steps = list(zip(times, times[1:]))
    found = [is_last(*step, max(times[: i + 2])) for i, step in enumerate(steps)]
    assert found == [False] * (len(steps) - 1) + [True]


def test_logarithms_have_no_last_call() -> None:
    times = [1.0 - 0.05 * i for i in range(50)]
    found = [is_last(*step, 1.0) for step in zip(times, times[1:])]
    assert not any(found[:17] + found[22:])  # 17 to 21: where they pass zero


def gaps(sampler: Sampler) -> list[int]:
    """Calls from each refresh to the next."""
    at = [number for number, _ in sampler.computed]
    return [b - a for a, b in zip(at, at[1:])]


def still(x: Tensor, t: float) -> Tensor:
    """A velocity that a line forecasts exactly: nothing but the end limits a gap."""
    return torch.linspace(-1, 1, len(x), dtype=torch.float64) * (3 + t)


@pytest.mark.parametrize("tolerance", [0.01, 0.1, 4.0])
def test_gaps_shrink_towards_the_end(tolerance: float) -> None:
    """No more than a share of the time left passes without a refresh; else gaps are the most."""
    sampler = Sampler(still, tolerance=tolerance, max_interval=9)
    sampler.run(100)
    share = min(0.5, END_SHARE * math.sqrt(tolerance))
    at = [number for number, _ in sampler.computed]
    allowed = [min(9, max(1, math.ceil(share * (100 - a) - 1e-6))) for a in at]
    grown = next(i for i, gap in enumerate(gaps(sampler)) if gap >= min(9, allowed[i]))
    assert gaps(sampler)[grown:-1] == allowed[grown:-2], sampler.kinds
    assert sampler.kinds.endswith("r"), "the last step, whatever the gap"


def test_a_rising_schedule_shrinks_the_same_way() -> None:
    falling, rising = (Sampler(still, tolerance=0.1, max_interval=9) for _ in range(2))
    falling.run(60)
    x = torch.zeros(len(falling.outputs[0]), dtype=torch.float64)
    for i in range(60):
        x = x + rising.velocity(x, i / 60) / 60
    assert rising.kinds == falling.kinds
    assert 1 < gaps(rising)[-3] < max(gaps(rising)) == 9


def test_a_schedule_of_logarithms_is_left_alone() -> None:
    """Behind zero nothing but the error bound counts."""
    sampler = Sampler(still, tolerance=1e-3, max_interval=5)
    x = torch.zeros(12, dtype=torch.float64)
    for i in range(60):
        x = x - sampler.velocity(x, 1.0 - i / 20) / 20
    assert set(gaps(sampler)[-6:]) == {5}


def test_held_outputs_under_noise_are_refreshed_towards_the_end() -> None:
    """As along an ODE."""
    held = Sampler(flow, tolerance=4.0, max_interval=12)
    held.run_flow(100, 0.3)
    assert max(gaps(held)) == 12
    for (at, _), gap in zip(held.computed[2:], gaps(held)[2:]):
        assert gap <= max(1, math.ceil(0.5 * (100 - at) - 1e-6)), held.kinds


def test_held_layers_keep_their_gaps() -> None:
    """They see each sample: nothing is owed at the end."""
    held = Sampler(follows, tolerance=4.0, max_interval=12)
    held.run(100, noise=0.3)
    assert set(held.kinds) == {"r", "f"}
    assert set(gaps(held)[2:-1]) == {12}


def test_an_interval_is_an_interval() -> None:
    """Without a tolerance every gap is as asked for but for the last call's."""
    sampler = Sampler(follows)
    sampler.controller = Controller(Options(policy="output_forecast", interval=5), ALL)
    sampler.run(53)
    assert set(gaps(sampler)[2:-1]) == {5}
