"""Hold all layers until the input of the first block has drifted too far.

    drift_i = |u_i - u_{i-1}|_1 / |u_{i-1}|_1     u: modulated input of the first attention
    refresh when the sum of drifts since the last refresh reaches `tolerance`

TeaCache: arXiv 2411.19108, section 3 and eq. 6. The paper rescales the drift by a polynomial fitted
per model; without one (identity) the tolerance is in units of the input's own relative change. One
number is read on the host per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moeca_compile.policies.protocol import Decision, Kind, Policy, Stored

if TYPE_CHECKING:
    from moeca_compile.options import Options
    from moeca_compile.runtime.session import StepInfo

TOLERANCE = 0.1


class TeaCachePolicy(Policy):
    """Accumulated drift decides; at the latest `max_interval` calls pass between refreshes."""

    probes = True

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.interval = options.max_interval
        self.tolerance = TOLERANCE if options.tolerance is None else options.tolerance
        self._drift: dict[int, float] = {}

    @classmethod
    def stores(cls, options: Options) -> Stored:
        """Layer outputs of the last refresh and the first block's input of the last step."""
        return Stored(layers=1, input=True)

    def choose(self, step: StepInfo, age: int) -> Decision:
        """Forecast (held layers) while the accumulated drift is small."""
        # not `<`: a drift that is no number refreshes
        if not self._drift.get(step.lane, 0.0) < self.tolerance:
            return Decision("refresh", "drift")
        return Decision("forecast", "policy")

    def mix(self, step: StepInfo, kind: Kind) -> tuple[float, ...]:
        """Held layers take the weight 1; a refresh starts the sum anew."""
        if kind == "refresh":
            self._drift[step.lane] = 0.0
        return (1.0,) if kind == "forecast" else ()

    def probed(self, lane: int, numbers: Sequence[float]) -> None:
        """Add the drift of this step's input since the last step."""
        self._drift[lane] = self._drift.get(lane, 0.0) + numbers[0]

    def evidence(self, lane: int) -> float | None:
        """Drift since the last refresh over the tolerance."""
        return self._drift[lane] / self.tolerance if lane in self._drift else None

    def forget(self, lane: int | None = None) -> None:
        """Drop one lane's sum, or all of them."""
        if lane is None:
            self._drift.clear()
        else:
            self._drift.pop(lane, None)
