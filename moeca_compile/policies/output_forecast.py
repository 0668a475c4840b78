"""Skip whole steps: the model's output is extrapolated, refreshes come when the error asks.

    refresh refresh refresh skip refresh skip skip refresh skip skip skip ...
    at a refresh: error e of the forecast, then  gap <- gap * min(2, sqrt(tolerance / e))

Between refreshes nothing of the model runs. The gap control is that of step sizes of ODE solvers
(Hairer, Norsett, Wanner, Solving ODEs I, II.4) with exponent 1/2: the error of a linear forecast
grows with the square of the gap. Output forecasts: TaylorSeer (arXiv 2503.06923) on the last layer.

The corrector: when the refresh at t_n is known, the outputs of the skipped steps are better known
too, by interpolation. What the sampler was handed wrongly, sum_i dt_i (v_i - used_i), is added to
the output of the refresh, divided by its own step: the sampler then is where it would have been,
up to second order, as with the corrector of a multistep method (ibid., III.1). It holds for
samplers that step along the output (Euler, DDIM and their like) and is left out where the sampler
adds noise or changes its step width by more than MAX_STEP_RATIO.

Towards the end of a schedule the output turns faster than the errors seen so far say: what a skip
owes is paid late or never. With a tolerance, no more than a share of the time left passes without
a refresh, so gaps shrink as the distance to the end does, and the last step is computed.

Heun's method evaluates a timestep twice, each time for half a step: the second output at a
timestep is that of the first but for the error of one Euler step, so it is never computed anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moeca_compile.policies.ending import is_last, time_left
from moeca_compile.policies.predictors import PREDICTIONS, Gram, Predictor, make_predictor
from moeca_compile.policies.protocol import Decision, Kind, Policy, Stored
from moeca_compile.policies.taylorseer import abscissa
from moeca_compile.policies.trail import Trail
from moeca_compile.runtime.session import SAME_STEP

if TYPE_CHECKING:
    from moeca_compile.options import Options
    from moeca_compile.runtime.session import StepInfo

MAX_GROWTH = 2.0  # of the gap from one refresh to the next
MAX_STEP_RATIO = 2.0  # of two steps' widths for the corrector to hold
NOISE_ALIGNMENT = 0.5  # cosine of two moves of the sample: below, the sampler adds noise
DEFAULT_ORDER = 1
# Times sqrt(tolerance): of the time left, what may pass without a refresh; at most half.
END_SHARE = 0.95
ROUNDING = 1e-5  # of timesteps in float32


@dataclass
class LaneForecast:
    """Numbers of one lane. gap: calls from the last refresh to the next. skipped: (time, weights of
    the stored outputs) since the last refresh. asked: the predictors as of the last refresh."""

    trail: Trail
    refreshes: int = 0
    apart: int = 0  # refreshes since the last one that repeated a timestep
    span: int = 1  # calls from the last refresh but one to the last
    gap: float = 1.0
    calls: int = 0  # since the last refresh
    skipped: list[tuple[float, Predictor]] = field(default_factory=list)
    asked: dict[tuple[str, int], Predictor] = field(default_factory=dict)
    chosen: tuple[str, int] | None = None
    error: float = math.nan
    gain: float = 0.0
    flow: bool = False  # whether the output is the velocity of a rectified flow, as "auto" sees it
    tells_flow: tuple[Predictor | None, ...] = (None, None)
    paces: tuple[float, ...] = ()  # relative change over the root of the calls, last two refreshes
    highest: float = 0.0  # timestep
    before: float = math.inf  # timestep of the last call
    noisy: bool | None = None  # whether the sampler adds noise; None: not known yet


class OutputForecastPolicy(Policy):
    """options.tolerance: bound of a forecast's relative error; None: every `interval` calls."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.tolerance = options.tolerance
        self.order = DEFAULT_ORDER if options.forecast_order is None else options.forecast_order
        if self.tolerance is not None:
            self.interval = options.max_interval
        self._depth = self.stores(options).outputs
        # one to start from, one for the slope, one that tells whether the sampler adds noise
        self._needed = 3
        self._lanes: dict[int, LaneForecast] = {}

    @classmethod
    def stores(cls, options: Options) -> Stored:
        """One output more than the order needs, at least two: they tell whether moves align."""
        order = DEFAULT_ORDER if options.forecast_order is None else options.forecast_order
        return Stored(outputs=max(2, order + 1))

    def choose(self, step: StepInfo, age: int) -> Decision:
        """Skip while the gap lasts and there are refreshes enough for the order."""
        lane = self._lane(step.lane)
        if step.reason == SAME_STEP and lane.refreshes and not (lane.calls or lane.noisy):
            return Decision("skip", "same_timestep")
        if lane.refreshes < self._needed:
            return Decision("refresh", "history")
        if is_last(lane.before, abscissa(step), lane.highest):
            return Decision("refresh", "last_step")  # nothing after it makes up for what is owed
        if lane.calls + 1 >= round(lane.gap):
            return Decision("refresh", "error_bound" if self.tolerance is not None else "interval")
        if self._nears_the_end(lane, abscissa(step)):
            return Decision("refresh", "near_end")
        if self._predictor(lane, abscissa(step)) is None:
            return Decision("refresh", "no_forecast")
        return self.between(lane)

    def _nears_the_end(self, lane: LaneForecast, now: float) -> bool:
        """Whether a skip would let pass too much of what was left at the last refresh."""
        last, tolerance = lane.trail.times[0], self.tolerance
        if tolerance is None or now == last or self.between(lane).kind != "skip":
            return False
        passed, share = abs(now - last), min(END_SHARE * math.sqrt(tolerance), 0.5)
        return passed >= share * (time_left(last, now, lane.highest) + passed) * (1.0 - ROUNDING)

    def order_in(self, lane: LaneForecast) -> int:
        """Of the extrapolating polynomial."""
        return self.order

    def corrects(self, lane: LaneForecast) -> bool:
        """Whether a refresh makes up for the skipped steps; not before it is known that it may."""
        return lane.noisy is False

    def between(self, lane: LaneForecast) -> Decision:
        """The variant of a step between two refreshes."""
        return Decision("skip", "policy")

    def mix(self, step: StepInfo, kind: Kind) -> tuple[float, ...]:
        """refresh: corrector [1 + outputs], of the new output and the stored ones.
        skip: predictor [2 * outputs + 1], see `Predictor.mix`."""
        lane, now = self._lane(step.lane), abscissa(step)
        lane.before = now
        if kind != "refresh":
            return self._advance(lane, now, kind)
        corrected = self._correction(lane, now)
        lane.asked = self._candidates(lane, now)
        if self.tolerance is None:
            lane.gap = float(self.options.interval)
        lane.apart = 0 if lane.trail.repeats(now) else lane.apart + 1
        lane.trail.add(now)
        lane.highest = max(lane.highest, abs(now))
        lane.refreshes += 1
        lane.span, lane.calls = lane.calls + 1, 0
        lane.skipped.clear()
        return corrected

    def measured(self, lane: int, numbers: Sequence[float]) -> None:
        """Errors of all predictors at the last refresh; the best one goes on, and sets the gap."""
        state, gram = self._lane(lane), Gram(self._depth, tuple(numbers))
        if state.refreshes > 1:
            state.gain = gram.gain()
        if not state.apart:  # Heun's two evaluations, both computed: they say nothing of a step
            state.gap = 1.0
        if state.refreshes < self._needed or not state.apart:
            return
        if state.apart > 1 and not math.isnan(alignment := gram.alignment()):
            state.noisy = alignment < NOISE_ALIGNMENT
        errors = {key: gram.error(each) for key, each in state.asked.items()}
        if not errors:
            return
        state.chosen = min(errors, key=lambda key: errors[key])
        state.error = errors[state.chosen]
        if self.tolerance is not None:
            state.gap = self._next_gap(state)

    def evidence(self, lane: int) -> float | None:
        """Error of the forecast that the last refresh replaced, over the tolerance."""
        found = self._lanes.get(lane)
        if self.tolerance is None or found is None or math.isnan(found.error):
            return None
        return found.error / self.tolerance

    def forget(self, lane: int | None = None) -> None:
        """Drop one lane's numbers, or all of them."""
        if lane is None:
            self._lanes.clear()
        else:
            self._lanes.pop(lane, None)

    def _next_gap(self, lane: LaneForecast) -> float:
        assert self.tolerance is not None
        if not math.isfinite(lane.error):
            return 1.0
        factor = math.sqrt(self.tolerance / max(lane.error, 1e-9))
        return min(max(1.0, lane.gap * min(MAX_GROWTH, factor)), float(self.interval))

    def _lane(self, key: int) -> LaneForecast:
        found = self._lanes.get(key)
        if found is None:
            found = self._lanes[key] = LaneForecast(Trail(self._depth))
        return found

    def _kinds(self) -> tuple[str, ...]:
        wanted = self.options.prediction
        return PREDICTIONS if wanted == "auto" else (wanted,)

    def _candidates(self, lane: LaneForecast, now: float) -> dict[tuple[str, int], Predictor]:
        found = {}
        highest = self.order_in(lane)
        lowest = 0 if self.options.prediction == "auto" else highest
        for kind in self._kinds():
            for order in range(lowest, highest + 1):
                made = make_predictor(kind, order, lane.trail, now, self._depth, lane.gain)
                if made is not None:
                    found[kind, order] = made
        return found

    def _predictor(self, lane: LaneForecast, now: float) -> Predictor | None:
        kind, order = lane.chosen or (self._kinds()[0], self.order)
        order = min(order, self.order_in(lane))
        return make_predictor(kind, order, lane.trail, now, self._depth, lane.gain)

    def _advance(self, lane: LaneForecast, now: float, kind: Kind) -> tuple[float, ...]:
        lane.calls += 1
        predictor = self._predictor(lane, now)
        assert predictor is not None
        if kind == "skip":
            lane.skipped.append((now, predictor))
        return predictor.mix

    def _correction(self, lane: LaneForecast, now: float) -> tuple[float, ...]:
        """k with output + k_0 output + sum_j k_j o_j corrected; zeros where it does not hold."""
        nothing = (0.0,) * (self._depth + 1)
        applies = self.options.corrector and self.corrects(lane)
        if not applies or not lane.skipped or not lane.trail.times:
            return nothing
        if any(each.kind != "output" for _, each in lane.skipped):
            return nothing
        widths = _widths([lane.trail.times[0], *(time for time, _ in lane.skipped), now])
        if not widths[-1] or any(not _alike(width, widths[-1]) for width in widths):
            return nothing
        result = [0.0] * (self._depth + 1)
        for (time, used), width in zip(lane.skipped, widths):
            share = width / widths[-1]
            newer, older = lane.trail.weights(time, 1, [now, lane.trail.times[0]])
            result[0] += share * newer
            result[1] += share * older
            for j, weight in enumerate(used.outputs):
                result[1 + j] -= share * weight
        return tuple(result)


def _widths(times: list[float]) -> list[float]:
    """How far the sampler steps along each output but the first and the last one. The second of two
    at one timestep belongs to the step that led there (Heun: half of it, as does the first)."""
    triples = zip(times, times[1:], times[2:])
    return [after - time or time - before for before, time, after in triples]


def _alike(width: float, last: float) -> bool:
    return 1 / MAX_STEP_RATIO <= width / last <= MAX_STEP_RATIO
