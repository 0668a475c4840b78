"""What was asked for, and which of two trade-offs comes nearer to it.

Target.parse({"speedup": 3})       at least 3 times faster, then as much PSNR as possible
Target.parse({"psnr_db": 40})      at least 40 dB, then as fast as possible
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from ..errors import OptionsError, name_nearest

SPEEDUP, PSNR = "speedup", "psnr_db"
SLACK = 0.05  # share of the target that may be missing on a seed the search did not see
MAX_PSNR = 150.0  # dB of equal images where figures are compared and averaged


@dataclass(frozen=True)
class Tradeoff:
    """One generation, or several together. speedup: full / spent. psnr_db: inf for equal images."""

    speedup: float
    psnr_db: float


@dataclass(frozen=True)
class Target:
    """name: "speedup" or "psnr_db"; value: what it has to reach at least."""

    name: str
    value: float

    @classmethod
    def parse(cls, target: Mapping[str, float]) -> Target:
        """From what the user gave. Raises OptionsError for anything but one of the two."""
        if not isinstance(target, Mapping) or len(target) != 1:
            raise OptionsError(
                f'target: expected {{"speedup": 3}} or {{"psnr_db": 40}}, got {target!r}'
            )
        ((name, value),) = target.items()
        if name not in (SPEEDUP, PSNR):
            raise OptionsError(f"target: unknown {name!r}{name_nearest(name, (SPEEDUP, PSNR))}")
        least = 1.0 if name == SPEEDUP else 0.0
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= least:
            raise OptionsError(f"target {name}: expected a number above {least:g}, got {value!r}")
        return cls(name, float(value))

    def constrained(self, made: Tradeoff) -> float:
        """The figure that has to reach `value`."""
        return made.speedup if self.name == SPEEDUP else min(made.psnr_db, MAX_PSNR)

    def wanted(self, made: Tradeoff) -> float:
        """The figure that should be high once the target is reached."""
        return min(made.psnr_db, MAX_PSNR) if self.name == SPEEDUP else made.speedup

    def reached(self, made: Tradeoff, slack: float = 0.0) -> bool:
        """Whether the target holds, but for the share `slack` of it."""
        return self.constrained(made) >= self.value * (1 - slack)

    def score(self, made: Sequence[Tradeoff]) -> float:
        """Higher is better: the wanted figure's mean, below zero where a seed misses the target."""
        worst = min(self.constrained(each) for each in made)
        if worst < self.value:
            return (worst - self.value) / self.value
        return fmean(self.wanted(each) for each in made)

    def hopeless(self, made: Tradeoff, best: float) -> bool:
        """Whether neither more nor less caching of this kind can beat a score of `best`.

        Towards the target the wanted figure only falls: short of the target and no better than the
        best there is, it cannot become better.
        """
        return not self.reached(made) and self.wanted(made) <= best


def worst(made: Sequence[Tradeoff]) -> Tradeoff:
    """The lowest of either figure: what holds on every seed."""
    return Tradeoff(min(m.speedup for m in made), min(m.psnr_db for m in made))
