"""What can still be afforded: nothing is started that would end after the time is up.

limit = TimeLimit(300.0)
limit.affords(20.0)     whether 20 s more leave what is reserved for the last measurement
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

Clock = Callable[[], float]


@dataclass
class TimeLimit:
    """seconds: for everything. reserve: kept back, in seconds. clock: seconds, ever increasing."""

    seconds: float
    clock: Clock = time.monotonic
    reserve: float = 0.0
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.started

    def affords(self, seconds: float) -> bool:
        """Whether something that takes `seconds` can be started and the reserve stays whole."""
        return self.spent + seconds + self.reserve <= self.seconds
