"""What every policy decides over a generation; the corrector on ODEs with a known solution."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moeca_compile.options import Options
from moeca_compile.policies import POLICIES, find_policy
from moeca_compile.policies.output_forecast import OutputForecastPolicy
from moeca_compile.policies.protocol import Policy
from moeca_compile.runtime.controller import Controller, LaneAges
from moeca_compile.runtime.session import StepInfo

ALL = frozenset(("reuse", "forecast", "skip"))


def info(step: int, time: float, reason: str = "continues", lane: int = 0) -> StepInfo:
    fresh = step == 0
    return StepInfo(0, lane, step, fresh, "new_lane" if fresh else reason, fresh, time)


def kinds(policy: str, steps: int = 12, **options: object) -> list[str]:
    controller = Controller(Options(policy=policy, **options), ALL)  # type: ignore[arg-type]
    ages, found = LaneAges(), []
    for i in range(steps):
        step = info(i, 1.0 - i / steps)
        age = ages.started(0)
        decision = controller.decide(step, age)
        controller.policy.mix(step, decision.kind)
        ages.ran(0, decision.kind, age)
        found.append(decision.kind)
    return found


@pytest.mark.parametrize("name", ["fora", "taylorseer"])
def test_layers_are_forecast_between_refreshes(name: str) -> None:
    assert kinds(name, 8, interval=3) == ["refresh", "forecast", "forecast"] * 2 + [
        "refresh",
        "forecast",
    ]


def test_duca_takes_turns() -> None:
    assert kinds("duca", 5, interval=4) == ["refresh", "forecast", "reuse", "forecast", "refresh"]


def test_uniform_output_forecast_starts_with_three_refreshes() -> None:
    found = kinds("output_forecast", 11, interval=4)
    assert found == ["refresh"] * 3 + (["skip"] * 3 + ["refresh"]) * 2


def test_auto_without_measurements_never_skips() -> None:
    assert set(kinds("auto")) == {"refresh"}


def test_teacache_refreshes_when_the_drift_adds_up() -> None:
    policy = find_policy("teacache")(Options(policy="teacache", tolerance=0.25))
    policy.mix(info(0, 1.0), "refresh")
    found = []
    for i in range(1, 7):
        policy.probed(0, [0.1])
        decision = policy.choose(info(i, 1.0 - i / 10), i - 1)
        policy.mix(info(i, 1.0), decision.kind)
        found.append(decision.kind)
    assert found == ["forecast", "forecast", "refresh"] * 2


def test_teacache_refreshes_on_a_drift_that_is_no_number() -> None:
    policy = find_policy("teacache")(Options(policy="teacache"))
    policy.mix(info(0, 1.0), "refresh")
    policy.probed(0, [math.nan])
    assert policy.choose(info(1, 0.9), 0).kind == "refresh"


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("interval", [2, 3, 5])
def test_no_policy_exceeds_its_interval(name: str, interval: int) -> None:
    found = kinds(name, 20, interval=interval, max_interval=interval, tolerance=1e9)
    gaps = [i for i, kind in enumerate(found) if kind == "refresh"]
    assert max(b - a for a, b in zip(gaps, [*gaps[1:], len(found)])) <= interval


class Ode:
    """dx/dt = field(x, t) in one vector [n], stepped by Euler; the policy decides what runs."""

    def __init__(self, field: Callable[[Tensor, float], Tensor], **options: object) -> None:
        self.field = field
        self.policy = OutputForecastPolicy(Options(policy="output_forecast", **options))  # type: ignore[arg-type]
        self.computed = 0

    def run(self, start: Tensor, times: list[float], noise: float = 0.0) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        x, outputs, samples, age = start.clone(), [], [], None
        for i, (t, after) in enumerate(zip(times, times[1:])):
            step = info(i, t)
            kind = "refresh" if age is None else self.policy.choose(step, age).kind
            mix = self.policy.mix(step, kind)  # type: ignore[arg-type]
            if kind == "skip":
                used = sum(c * o for c, o in zip(mix, outputs))
                assert isinstance(used, Tensor)
                v, age = used, (age or 0) + 1
            else:
                v, age = self._refresh(x, t, mix, outputs, samples), 0
            x = x + (after - t) * v + noise * torch.randn(x.shape, generator=generator).double()
        return x

    def _refresh(
        self, x: Tensor, t: float, mix: tuple[float, ...], outputs: list, samples: list
    ) -> Tensor:
        self.computed += 1
        new = self.field(x, t)
        depth = len(mix) - 1
        old = [*outputs, *[torch.zeros_like(x)] * (depth - len(outputs))]
        was = [x, *samples, *[torch.zeros_like(x)] * (depth - len(samples))]
        basis = [new - old[0], old[0], *(a - b for a, b in zip(old, old[1:]))]
        basis += [a - b for a, b in zip(was, was[1:])]
        stacked = torch.stack(basis)
        fixed = new + mix[0] * new + sum(k * o for k, o in zip(mix[1:], old))
        outputs[:] = [new, *outputs][:depth]
        samples[:] = [x, *samples][:depth]
        self.policy.measured(0, (stacked @ stacked.t()).reshape(-1).tolist())
        return fixed


def euler(field: Callable[[Tensor, float], Tensor], start: Tensor, times: list[float]) -> Tensor:
    x = start.clone()
    for t, after in zip(times, times[1:]):
        x = x + (after - t) * field(x, t)
    return x


TIMES = [1.0 - i / 50 for i in range(51)]
START = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def swirl(x: Tensor, t: float) -> Tensor:
    return torch.stack([x[1] * math.cos(4 * t), -x[0], x[2] * t - 0.5])


def test_a_linear_output_is_forecast_exactly() -> None:
    slope = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    ode = Ode(lambda x, t: slope * t + 1, interval=5, corrector=False)
    torch.testing.assert_close(
        ode.run(START, TIMES), euler(lambda x, t: slope * t + 1, START, TIMES)
    )
    assert ode.computed < 15


def test_the_corrector_makes_up_for_a_held_output() -> None:
    """Order 0 lags behind a linear output; the corrector brings Euler's own result back."""
    slope = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    field = lambda x, t: slope * t + 1  # noqa: E731
    times = TIMES[:48]  # the last step, 46, is a refresh: nothing is left uncorrected
    expected = euler(field, START, times)
    plain = Ode(field, interval=4, forecast_order=0, corrector=False).run(START, times)
    corrected = Ode(field, interval=4, forecast_order=0).run(START, times)
    assert (plain - expected).norm() > 0.05
    torch.testing.assert_close(corrected, expected)


@pytest.mark.parametrize("interval", [3, 5])
def test_the_corrector_helps_where_the_field_depends_on_the_sample(interval: int) -> None:
    expected = euler(swirl, START, TIMES)
    plain = Ode(swirl, interval=interval, corrector=False).run(START, TIMES)
    corrected = Ode(swirl, interval=interval).run(START, TIMES)
    assert (corrected - expected).norm() < 0.7 * (plain - expected).norm()


def test_the_tolerance_bounds_the_error_and_spends_more_when_tight() -> None:
    expected = euler(swirl, START, TIMES)
    found = {}
    for tolerance in (1e-3, 1e-2, 1e-1):
        ode = Ode(swirl, tolerance=tolerance, max_interval=10)
        found[tolerance] = (ode.computed, float((ode.run(START, TIMES) - expected).norm()))
        found[tolerance] = (ode.computed, found[tolerance][1])
    computed = [found[t][0] for t in (1e-3, 1e-2, 1e-1)]
    errors = [found[t][1] for t in (1e-3, 1e-2, 1e-1)]
    assert computed == sorted(computed, reverse=True) and computed[0] > computed[-1]
    assert errors[0] < errors[-1]


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_noise_is_recognised(noise: float) -> None:
    """It switches the corrector off: noise is no error to make up for."""
    ode = Ode(lambda x, t: -x * t, interval=4)
    times = [t + 0.2 for t in TIMES]  # ends on the way: the last step to zero would be a refresh
    ode.run(torch.ones(500, dtype=torch.float64), times, noise=noise)
    lane = ode.policy._lanes[0]
    assert lane.noisy is (noise > 0)
    assert len(lane.skipped) == 3
    assert any(ode.policy.mix(info(50, 0.2), "refresh")) == (noise == 0)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_forgetting_a_lane_leaves_the_others(name: str) -> None:
    policy: Policy = find_policy(name)(Options(policy=name))
    for lane in (0, 1):
        for i in range(4):
            policy.mix(info(i, 1.0 - i / 10, lane=lane), "refresh")
    policy.forget(0)
    policy.forget()
    policy.mix(info(0, 1.0), "refresh")
    assert policy.stores(policy.options) == find_policy(name).stores(policy.options)
