"""What the `auto` policy makes of a sampler: ODE, noise on a flow, on others, two evaluations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moeca_compile.bench.samplers import SharedNoise, ancestral, from_velocity, straight_path
from moeca_compile.options import Options
from moeca_compile.policies import find_policy
from moeca_compile.policies.auto import DAMPING, FLOW_GAP, LAYER_GAP
from moeca_compile.policies.output_forecast import OutputForecastPolicy
from moeca_compile.runtime.controller import Controller, LaneAges
from moeca_compile.runtime.session import StepInfo

ALL = frozenset(("reuse", "forecast", "skip"))
SIZE = 2000


class Sampler:
    """dx = v dt + noise in one vector [SIZE]; v is what the field gives or the policy says.

    field: v(x, t). A step of the policy is answered as the compiled variants would: `kinds` is what
    ran, `computed` the outputs of the refreshes; `forecasts`: (timestep, those of the last refresh
    and of the one before, weights of the layers' outputs there).
    """

    def __init__(self, field, available=ALL, **options) -> None:  # type: ignore[no-untyped-def]
        self.controller = Controller(Options(policy="auto", **options), available)
        self.field, self.ages, self.kinds = field, LaneAges(), ""
        self.outputs: list[Tensor] = []
        self.samples: list[Tensor] = []
        self.computed: list[tuple[int, Tensor]] = []  # number of the call, output
        self.refreshed: list[float] = []  # timesteps
        self.forecasts: list[tuple[float, float, float, tuple[float, ...]]] = []
        self.numbers: list[float] | None = None
        self.last: float | None = None
        self.span = 1.0  # of the timesteps the model is given

    @property
    def policy(self) -> OutputForecastPolicy:
        found = self.controller.policy
        assert isinstance(found, OutputForecastPolicy)
        return found

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """One call of the model, as the entry runs it."""
        first, repeats = not self.kinds, t == self.last
        reason = "new_lane" if first else "same_step" if repeats else "continues"
        step = StepInfo(0, 0, len(self.kinds), first, reason, first, t)
        age, self.last = self.ages.started(0), t
        if self.numbers is not None:
            self.policy.measured(0, self.numbers)
            self.numbers = None
        kind = self.controller.decide(step, age).kind
        mix = self.policy.mix(step, kind)
        self.ages.ran(0, kind, age)
        self.kinds += kind[0]
        if kind == "skip":
            return sum((c * o for c, o in zip(mix, self.outputs)), torch.zeros_like(x))
        if kind == "forecast":
            self.forecasts.append((t, self.refreshed[-1], self.refreshed[-2], mix))
            return self.field(x, t)  # of forecast layers: here the exact value will do
        self.refreshed.append(t)
        return self._refresh(x, t, mix)

    def _refresh(self, x: Tensor, t: float, mix: tuple[float, ...]) -> Tensor:
        new, depth = self.field(x, t), len(mix) - 1
        old = [*self.outputs, *[torch.zeros_like(x)] * (depth - len(self.outputs))]
        was = [x, *self.samples, *[torch.zeros_like(x)] * (depth - len(self.samples))]
        basis = [new - old[0], old[0], *(a - b for a, b in zip(old, old[1:]))]
        stacked = torch.stack([*basis, *(a - b for a, b in zip(was, was[1:]))])
        self.numbers = (stacked @ stacked.t()).reshape(-1).tolist()
        self.computed.append((len(self.kinds) - 1, new))
        self.outputs, self.samples = [new, *self.outputs][:depth], [x, *self.samples][:depth]
        return new + mix[0] * new + sum(k * o for k, o in zip(mix[1:], old))

    def run(self, steps: int, noise: float = 0.0, heun: bool = False) -> Tensor:
        """x at t = 0."""
        generator = torch.Generator().manual_seed(0)
        draw = lambda: torch.randn(SIZE, generator=generator, dtype=torch.float64)  # noqa: E731
        x = draw()
        for i in range(steps):
            t, after = 1 - i / steps, 1 - (i + 1) / steps
            v = self.velocity(x, t * self.span)
            if heun and i + 1 < steps:
                v = (v + self.velocity(x - (t - after) * v, after)) / 2
            x = x - (t - after) * v + noise * draw()
        return x

    def run_flow(self, steps: int, eta: float = 1.0) -> Tensor:
        """x at t = 0 by the ancestral sampler of a rectified flow."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(SIZE, generator=generator, dtype=torch.float64)
        denoise = from_velocity(lambda x, t: self.velocity(x, t * self.span))
        noise = SharedNoise(generator, steps, steps)
        return ancestral(denoise, x, straight_path(steps), eta, noise)


def exact(field) -> Sampler:  # type: ignore[no-untyped-def]
    """Without a policy."""
    sampler = Sampler(field, interval=1)
    sampler.velocity = field  # type: ignore[method-assign]
    return sampler


def follows(x: Tensor, t: float) -> Tensor:
    """A velocity that follows the sample, hence its noise, and drifts."""
    return 0.6 * x + torch.linspace(-1, 1, SIZE, dtype=torch.float64) * math.cos(3 * t)


def flow(x: Tensor, t: float) -> Tensor:
    """The velocity of a rectified flow; its clean image drifts, and follows the sample in a way
    that is no multiple of it."""
    drift = torch.linspace(-1, 1, SIZE, dtype=torch.float64) * math.cos(3 * t)
    return (x - drift - 0.1 * torch.sin(3 * x)) / t


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_noise_on_a_flow_holds_the_output() -> None:
    sampler = Sampler(flow)
    sampler.run_flow(60)
    assert set(sampler.kinds) == {"r", "s"}
    first, *gaps, last = map(len, sampler.kinds.split("r"))
    assert (first, last, gaps[:2]) == (0, 0, [0, 0])
    assert min(gaps[2:-1]) >= 1, "at least every other output is held"


def check_gaps(sampler: Sampler, bound: float, least: float, most: float) -> None:
    """Every gap is that at which a walk as fast as between the last three refreshes reaches
    `bound`: worked out anew from the outputs, and not always at a limit."""
    expected: list[float] = []
    paces: list[float] = []
    found: list[int] = []
    for (at, old), (now, new) in zip(sampler.computed, sampler.computed[1:]):
        found.append(now - at)
        paces.append(float((new - old).norm() / new.norm()) / math.sqrt(now - at))
        wanted = bound / math.sqrt(math.prod(paces[-2:])) if len(paces) > 1 else math.nan
        expected.append(min(max(least, wanted), most))
    pairs = list(zip(expected[1:], found[2:]))[:-1]  # the last step is a refresh in any case
    assert all(gap == round(wanted) for wanted, gap in pairs), pairs
    assert sum(least < wanted < most for wanted, _ in pairs) > 5


@pytest.mark.parametrize("tolerance", [0.15, 0.3])
def test_a_held_outputs_gap_follows_its_pace(tolerance: float) -> None:
    sampler = Sampler(flow, tolerance=tolerance, max_interval=9)
    sampler.run_flow(120)
    assert set(sampler.kinds) == {"r", "s"}
    check_gaps(sampler, FLOW_GAP * math.sqrt(tolerance), 2, 9)


def test_gaps_are_longest_where_the_output_is_slow() -> None:
    """Here where the sampler adds least noise."""
    sampler, gaps = Sampler(flow, tolerance=0.2, max_interval=9), []
    generator = torch.Generator().manual_seed(0)
    x, path = torch.randn(SIZE, generator=generator, dtype=torch.float64), straight_path(180)
    for part, eta in enumerate((0.8, 0.2, 0.8)):
        before, noise = len(sampler.kinds), SharedNoise(generator, 60, 60)
        x = ancestral(from_velocity(sampler.velocity), x, path[60 * part :][:61], eta, noise)
        settled = sampler.kinds[before + 10 :].strip("s").strip("r")
        gaps.append([len(held) + 1 for held in settled.split("r") if held])
    assert set(sampler.kinds) == {"r", "s"}
    assert min(gaps[1]) > max(gaps[0]) and min(gaps[1]) > max(gaps[2]), gaps


def test_held_layers_gaps_follow_the_pace_down_to_every_step() -> None:
    mean = {}
    for tolerance in (0.001, 0.08, 0.3):
        sampler = Sampler(follows, tolerance=tolerance, max_interval=9)
        sampler.run(90, noise=0.3)
        assert set(sampler.kinds) <= {"r", "f"}
        if tolerance == 0.08:
            check_gaps(sampler, LAYER_GAP * math.sqrt(tolerance), 1, 9)
        mean[tolerance] = 90 / sampler.kinds.count("r")
    assert mean[0.001] < mean[0.08] < mean[0.3]
    assert mean[0.001] < 1.1, "where one call changes more than the bound, every call is computed"


def test_the_corrector_pays_back_what_a_held_output_missed_under_noise() -> None:
    """The residue of a Brownian bridge is half the walk's or less; 0.75 leaves room. Short gaps:
    in long ones this field's drift, not the noise, is what a held output misses."""
    expected = exact(flow).run_flow(61, 0.3)
    found = [Sampler(flow, corrector=c, tolerance=0.05).run_flow(61, 0.3) for c in (True, False)]
    corrected, plain = (error(each, expected) for each in found)
    assert plain > 1e-4
    assert corrected < 0.75 * plain


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_noise_on_a_flow_in_thousandths_is_the_same(eta: float) -> None:
    """Pipelines count a flow's time to 1000; how strong the noise is does not matter."""
    sampler = Sampler(lambda x, t: flow(x, t / 1000))
    sampler.span = 1000.0
    sampler.run_flow(60, eta)
    assert set(sampler.kinds) == {"r", "s"}


@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_noise_on_another_output_forecasts_layers(noise: float) -> None:
    """What follows the sample, as predicted noise does, would miss all noise that was added."""
    sampler = Sampler(follows)
    sampler.run(40, noise=noise)
    assert set(sampler.kinds) == {"r", "f"}


def test_layers_follow_a_part_of_their_slope() -> None:
    sampler = Sampler(follows)
    sampler.run(60, noise=0.3)
    assert len(sampler.forecasts) > 10 and 0.5 <= DAMPING <= 0.75  # docs/quality.md: what is best
    for now, last, before, weights in sampler.forecasts:
        part = DAMPING * (now - last) / (last - before)
        assert weights == pytest.approx((1 + part, -part))


def test_noise_without_layers_to_forecast_computes() -> None:
    sampler = Sampler(follows, available=frozenset(("skip",)))
    sampler.run(40, noise=2.0)
    assert set(sampler.kinds) == {"r"}


def test_few_noisy_steps_are_all_computed() -> None:
    sampler = Sampler(follows)
    sampler.run(8, noise=0.05)
    assert set(sampler.kinds) == {"r"}


def test_few_steps_of_a_curved_ode_are_all_computed() -> None:
    """The last step too: its predecessors' errors exceed the bound."""
    sampler = Sampler(lambda x, t: torch.sin(20 * t + 3 * x))
    sampler.run(7)
    assert set(sampler.kinds) == {"r"}


def test_the_last_step_is_computed() -> None:
    sampler = Sampler(follows, tolerance=1.0)
    sampler.run(50)
    assert "ssss" in sampler.kinds and sampler.kinds.endswith("r")


def test_the_second_output_at_a_timestep_is_the_first() -> None:
    sampler = Sampler(follows, tolerance=1e-9)
    found = sampler.run(25, heun=True)
    assert sampler.kinds == "rr" + "sr" * 23 + "s"
    assert error(found, exact(follows).run(25, heun=True)) < 2e-3


def test_heun_after_a_warm_up_starts_with_short_gaps() -> None:
    """The two evaluations of a warm-up step are near each other: no error to grow a gap by, and no
    two moves of the sample to call it noisy by."""
    sampler = Sampler(follows, warmup_steps=6)
    found = sampler.run(25, heun=True)
    warm, rest = sampler.kinds[:6], sampler.kinds[6:]
    assert set(warm) == {"r"} and set(rest) == {"r", "s"} and max(map(len, rest.split("r")[:2])) < 3
    assert not sampler.policy._lane(0).noisy
    assert error(found, exact(follows).run(25, heun=True)) < 2e-3


def test_heun_is_corrected() -> None:
    """Both evaluations count half a step, whichever of them a refresh is."""
    expected = exact(follows).run(25, heun=True)
    errors = {}
    for corrector in (True, False):
        sampler = Sampler(follows, tolerance=0.05, corrector=corrector)
        errors[corrector] = error(sampler.run(25, heun=True), expected)
        assert sampler.kinds.count("r") < 20
    assert errors[True] < 0.7 * errors[False]


def test_a_model_without_a_timestep_refreshes() -> None:
    """The session cannot place its calls: each is fresh."""
    controller = Controller(Options(), ALL)
    step = StepInfo(0, 0, 3, True, "timestep_unknown", False, None)
    assert [controller.decide(step, age).kind for age in (None, 0, 1)] == ["refresh"] * 3


def test_two_lanes_are_judged_apart() -> None:
    policy = find_policy("auto")(Options())
    for lane, noisy in ((0, True), (1, False)):
        policy._lane(lane).noisy = noisy  # type: ignore[attr-defined]
    orders = [policy.order_in(policy._lane(lane)) for lane in (0, 1)]  # type: ignore[attr-defined]
    assert orders == [0, 1]
