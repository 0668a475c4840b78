"""Polynomials through the refreshes of a lane: what a forecast reads, in numbers of the host.

    refreshes at t = 0.9, 0.8 (newest first 0.8, 0.9), now 0.75, order 1
    ->  weights (1.5, -0.5):  forecast = 1.5 * f(0.8) - 0.5 * f(0.9)

Lagrange's form holds for uneven steps. For even steps of order 1 and 2 it equals the finite
differences of TaylorSeer (arXiv 2503.06923, eq. 5 with Newton's differences in place of Taylor's).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

SAME_TIME = 1e-9


def lagrange_weights(times: Sequence[float], now: float) -> list[float]:
    """Weights w with sum_j w_j f(times_j) = the polynomial through all (times_j, f) at `now`."""
    return [
        math.prod((now - other) / (time - other) for k, other in enumerate(times) if k != j)
        for j, time in enumerate(times)
    ]


class Trail:
    """Timesteps of a lane's refreshes, newest first, at most `depth`; a timestep that repeats
    (Heun's second evaluation) makes the older entry useless, not wrong."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.times: list[float] = []

    def add(self, time: float) -> None:
        """A refresh at `time` was stored."""
        self.times = [time, *self.times][: self.depth]

    def repeats(self, time: float) -> bool:
        """Whether `time` is that of the newest refresh."""
        return bool(self.times) and not _apart(time, self.times[0])

    def weights(self, now: float, order: int, times: Sequence[float] | None = None) -> list[float]:
        """One weight per stored refresh, zero for those beyond `order` and for repeated times.

        times: of other points than the stored ones. Raises ValueError when there are none.
        """
        times = self.times if times is None else times
        if not times:
            raise ValueError("trail: expected at least one refresh, found none")
        picked: list[int] = []
        for j, time in enumerate(times):
            if len(picked) <= order and all(_apart(time, times[k]) for k in picked):
                picked.append(j)
        weights = [0.0] * len(times)
        for j, weight in zip(picked, lagrange_weights([times[j] for j in picked], now)):
            weights[j] = weight
        return weights


def _apart(one: float, other: float) -> bool:
    return abs(one - other) > SAME_TIME * max(abs(one), abs(other), SAME_TIME)
