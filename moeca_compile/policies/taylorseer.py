"""Layer outputs held (FORA) or extrapolated (TaylorSeer) from one refresh to the next.

    interval=3:           refresh forecast forecast refresh ...
    FORA, order 0:        attention and experts give what they gave at the last refresh
    TaylorSeer, order 1:  f(t) = f(t1) + (f(t1) - f(t2)) * (t - t1) / (t1 - t2)

FORA: arXiv 2407.01425, section 3 (static interval, attention and MLP outputs of every layer).
TaylorSeer: arXiv 2503.06923, eq. 5. Both here act on attention and on the whole of an MoE layer;
modulation, norms and the residual stream are computed at every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeca_compile.policies.protocol import Decision, Kind, Policy, Stored
from moeca_compile.policies.trail import Trail

if TYPE_CHECKING:
    from moeca_compile.options import Options
    from moeca_compile.runtime.session import StepInfo


def abscissa(step: StepInfo) -> float:
    """Where a step lies on the axis of forecasts: its timestep, else its number."""
    return float(step.step) if step.timestep is None else step.timestep


class TaylorSeerPolicy(Policy):
    """Every step between two refreshes is a forecast of `forecast_order`, 1 by default."""

    DEFAULT_ORDER = 1

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._depth = self.stores(options).layers
        self._trails: dict[int, Trail] = {}

    @classmethod
    def order(cls, options: Options) -> int:
        """The polynomial's order."""
        return cls.DEFAULT_ORDER if options.forecast_order is None else options.forecast_order

    @classmethod
    def stores(cls, options: Options) -> Stored:
        """Layer outputs at as many refreshes as the order needs."""
        return Stored(layers=cls.order(options) + 1)

    def choose(self, step: StepInfo, age: int) -> Decision:
        """Always forecast; the order grows with the refreshes there are."""
        return Decision("forecast", "policy")

    def mix(self, step: StepInfo, kind: Kind) -> tuple[float, ...]:
        """Weights of the stored refreshes [layers]; () for a refresh."""
        trail = self._trails.setdefault(step.lane, Trail(self._depth))
        if kind == "refresh":
            trail.add(abscissa(step))
            return ()
        weights = trail.weights(abscissa(step), self._depth - 1)
        return tuple(weights) + (0.0,) * (self._depth - len(weights))

    def forget(self, lane: int | None = None) -> None:
        """Drop one lane's refreshes, or all of them."""
        if lane is None:
            self._trails.clear()
        else:
            self._trails.pop(lane, None)


class ForaPolicy(TaylorSeerPolicy):
    """Order 0: what attention and experts gave at the last refresh."""

    DEFAULT_ORDER = 0

    @classmethod
    def order(cls, options: Options) -> int:
        """Always 0."""
        return 0
