"""Steps of the sampling loop across the entries of one compiled model (one entry per input shape).

    batch 2 at t0, t1    batch 3 at t2, t3    batch 2 at t4: its rows are three steps old
    two-call CFG with texts of different length: both entries are called at every timestep, none old

A lane counts its own calls only. What ran meanwhile at other shapes shows in the timesteps.
"""

from __future__ import annotations

ELSEWHERE = "steps_at_other_shapes"


class Turns:
    """Shared by the entries: a number that moves on whenever the timestep does."""

    def __init__(self) -> None:
        self._number = 0
        self._timestep: float | None = None

    def at(self, timestep: float | None) -> int:
        """The number of the step at `timestep`; an unknown one belongs to the step before."""
        if timestep is not None and timestep != self._timestep:
            self._number += 1
            self._timestep = timestep
        return self._number
