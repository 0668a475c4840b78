"""The default: the model's output is forecast; what a sampler's noise undoes, layers are.

    ODE                    refresh skip skip refresh ...           linear forecast, error bound
    noise, rectified flow  refresh skip skip refresh ...           output held, by its pace
    noise, other models    refresh forecast forecast refresh ...   layers, by the output's pace
    few, large steps       refresh refresh refresh ...

Which one it is shows at every refresh. Along an ODE one move of the sample points where the last
one did (cosine near 1), noise turns it (near 0). Under noise the output follows each step's noise,
so its slope says nothing. What a held output missed grew as a random walk from one refresh to the
next; half-way it is half known afterwards (a Brownian bridge), and the corrector of
`output_forecast` pays it back. That wants a sampler that steps along the output, as those of a
rectified flow do. Samplers of noise prediction weigh it by the timestep and often clip the clean
image; there attention and experts are forecast, and the rest of each layer sees the sample. Their
slope is part trend and part noise: it is damped (DAMPING), as by Gardner and McKenzie, Forecasting
trends in time series, 1985; held (FORA) or with their whole slope (TaylorSeer) they are worse. A
flow is recognised by what its output is: the clean image x - t v stays as smooth as anything fitted
to the output's response (FLOW_MARGIN). The gap is that at which the walk, as fast as it was between
the last refreshes, reaches a bound set by the tolerance: short where the picture is decided and
where it is finished, long in between.
Measured on the trained models of `examples/`; docs/quality.md has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import geometric_mean
from typing import TYPE_CHECKING

from moeca_compile.policies.output_forecast import LaneForecast, OutputForecastPolicy
from moeca_compile.policies.predictors import Gram, make_predictor
from moeca_compile.policies.protocol import Decision, Kind, Stored
from moeca_compile.policies.taylorseer import abscissa

if TYPE_CHECKING:
    from moeca_compile.options import Options
    from moeca_compile.runtime.session import StepInfo

TOLERANCE = 0.12  # of the output's relative forecast error, where the options give none
# Under noise: gap = constant * sqrt(tolerance) / the output's relative change in one call. A
# layer follows much of the change, a held output is corrected: at least every other one is held.
FLOW_GAP, LEAST_FLOW_GAP = 1.5, 2.0
LAYER_GAP, LEAST_LAYER_GAP = 3.7, 1.0
LEAST_CHANGE = 1e-6  # relative
# Error of the clean image over that of the fitted response: 0.6 to 1.0 was seen for flows, 2.0 to
# 5 for noise prediction.
FLOW_MARGIN = 1.4
LAYERS = 2  # refreshes of which layer outputs are stored
DAMPING = 0.6  # of their slope; 0.5 and 0.75 are as good within 0.3 dB
MAX_WIDTH = 0.05  # of a noisy step, over the highest noise level: wider steps are all computed


class AutoPolicy(OutputForecastPolicy):
    """Output forecasts under an error bound; under noise held outputs, or forecast layers."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.tolerance = TOLERANCE if options.tolerance is None else options.tolerance
        self.interval = options.max_interval

    @classmethod
    def stores(cls, options: Options) -> Stored:
        """Outputs as `output_forecast`, and the layers' at the last two refreshes."""
        return Stored(layers=LAYERS, outputs=super().stores(options).outputs)

    def between(self, lane: LaneForecast) -> Decision:
        """Skip along an ODE and in a flow; forecast layers, where there are any, else."""
        if not lane.noisy or lane.flow:
            return Decision("skip", "policy")
        if "forecast" in self.available:
            return Decision("forecast", "noisy_sampler")
        return Decision("refresh", "noisy_sampler")

    def mix(self, step: StepInfo, kind: Kind) -> tuple[float, ...]:
        """As `output_forecast`; forecast: weights of the layers' refreshes [LAYERS]."""
        lane, now = self._lane(step.lane), abscissa(step)
        if kind == "refresh":
            lane.tells_flow = tuple(
                make_predictor(each, 0, lane.trail, now, self._depth, lane.gain)
                for each in ("clean", "response")
            )
        found = super().mix(step, kind)
        return self._damped(lane, now) if kind == "forecast" else found

    def measured(self, lane: int, numbers: Sequence[float]) -> None:
        """As `output_forecast`; under noise the gap follows the output's pace, not the error."""
        super().measured(lane, numbers)
        state, gram = self._lane(lane), Gram(self._depth, tuple(numbers))
        if not state.apart:
            return
        if state.refreshes > 1 and math.isfinite(change := gram.change()):
            pace = max(change, LEAST_CHANGE) / math.sqrt(state.span)
            state.paces = (*state.paces[-1:], pace)
        if not state.noisy:
            return
        if self.options.prediction == "auto":
            state.chosen = None  # what fits noise best is biased where the image is made
        clean, response = (math.inf if p is None else gram.error(p) for p in state.tells_flow)
        if math.isfinite(clean) and math.isfinite(response):
            state.flow = clean <= FLOW_MARGIN * response
        state.gap = self._noisy_gap(state) if state.paces and _steps_are_small(state) else 1.0

    def order_in(self, lane: LaneForecast) -> int:
        """A slope between two noisy outputs is noise: they are held."""
        return 0 if lane.noisy else self.order

    def corrects(self, lane: LaneForecast) -> bool:
        """Under noise, too."""
        return lane.noisy is not None

    def _damped(self, lane: LaneForecast, now: float) -> tuple[float, ...]:
        """The line through the last refreshes at `now`, its slope damped."""
        line = [*lane.trail.weights(now, 1, lane.trail.times[:LAYERS]), 0.0][:LAYERS]
        held = (1.0, *[0.0] * (LAYERS - 1))
        return tuple(h + DAMPING * (w - h) for h, w in zip(held, line, strict=True))

    def _noisy_gap(self, lane: LaneForecast) -> float:
        assert self.tolerance is not None
        held, least = (FLOW_GAP, LEAST_FLOW_GAP) if lane.flow else (LAYER_GAP, LEAST_LAYER_GAP)
        wanted = held * math.sqrt(self.tolerance) / geometric_mean(lane.paces)
        return min(max(least, wanted), float(self.interval))


def _steps_are_small(lane: LaneForecast) -> bool:
    newest, before = lane.trail.times[:2]
    return abs(newest - before) <= MAX_WIDTH * lane.span * lane.highest
