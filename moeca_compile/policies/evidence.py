"""When the evidence says that reused rows have become too wrong: refreshes at a bound.

    every step           drift D, switched weight S      grow with the calls since the refresh
    refresh              what reuse would have erred by: e = c (D + S)^p,  which gives c
    the call to come     c (D' + S')^p > tolerance       ->  refresh

p is the order of what is neglected: 1 where rows are held, 2 where they are extrapolated. Before
the first refresh that had rows to compare with, c = 1 and p = 1: outputs change as their inputs do.
The numbers are read one call late, and D, S are carried on at the rate seen last: no step waits for
itself. Control by the error seen last is that of ODE solvers (Hairer, Norsett, Wanner, Solving ODEs
I, II.4); TeaCache (arXiv 2411.19108) steers by input drift alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moeca_compile.policies.protocol import Kind

TINY = 1e-12


@dataclass
class LaneEvidence:
    """Numbers of one lane. rate: of D + S, a call. scale, power: c, p. calls: since a refresh."""

    power: int
    rate: float = 0.0
    scale: float = 1.0
    seen: int = 0  # refreshes
    calls: int = 0
    last: Kind = "refresh"
    gap: int = 0  # calls from the refresh before the last to the last
    asked: float = 0.0  # predicted last

    def ran(self, kind: Kind) -> None:
        """A step of this kind is about to run."""
        self.calls += 1
        self.last = kind
        if kind == "refresh":
            self.gap, self.calls = self.calls, 0
            self.seen += 1

    def measured(self, numbers: Sequence[float]) -> None:
        """What the last step found: (D, S, e)."""
        drift, switched, error = numbers
        if self.last != "refresh":
            self.rate = (drift + switched) / max(1, self.calls)
        elif self.seen > 1:  # the first one had nothing to compare with
            total = drift + switched
            self.rate = total / max(1, self.gap)
            power = self.power if self.seen > 2 else 1
            self.scale = error / max(total, TINY) ** power

    def predicted(self, age: int) -> float:
        """Relative error of a reuse step `age + 1` calls after a refresh; infinite if no number."""
        power = self.power if self.seen > 2 else 1
        error = self.scale * (self.rate * (age + 1)) ** power
        self.asked = error if math.isfinite(error) else math.inf
        return self.asked
