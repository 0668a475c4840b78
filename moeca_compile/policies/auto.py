"""The default: whole steps are forecast where that holds, layers where the sampler adds noise.

    ODE sampler          refresh skip skip refresh ...      output forecast, corrected
    stochastic sampler   refresh forecast refresh ...       layers held, embedding and norms fresh

Which of the two a sampler is shows in its own moves: along an ODE one move of the sample points
where the last one did (cosine near 1), noise turns it (near 0). Measured on the trained models of
`examples/`, docs/quality.md has the figures and where another policy does better.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeca_compile.policies.output_forecast import LaneForecast, OutputForecastPolicy
from moeca_compile.policies.protocol import Decision, Kind, Stored

if TYPE_CHECKING:
    from moeca_compile.options import Options
    from moeca_compile.runtime.session import StepInfo

TOLERANCE = 0.08  # of the output's relative forecast error, where the options give none


class AutoPolicy(OutputForecastPolicy):
    """Output forecasts under an error bound; under noise, layer outputs held as in FORA."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.tolerance = TOLERANCE if options.tolerance is None else options.tolerance
        self.interval = options.max_interval

    @classmethod
    def stores(cls, options: Options) -> Stored:
        """Outputs as `output_forecast`, and the layers' at the last refresh."""
        return Stored(layers=1, outputs=super().stores(options).outputs)

    def between(self, lane: LaneForecast) -> Decision:
        """Skip along an ODE; forecast layers, where there are any, under noise."""
        if lane.noisy and "forecast" in self.available:
            return Decision("forecast", "noisy_sampler")
        return Decision("skip", "policy")

    def mix(self, step: StepInfo, kind: Kind) -> tuple[float, ...]:
        """As `output_forecast`; held layers take the weight 1."""
        found = super().mix(step, kind)
        return (1.0,) if kind == "forecast" else found
