"""The published method: between two refreshes every step is a reuse step (paper, N = 4).

    interval=4:                 refresh reuse reuse reuse refresh reuse ...
    tolerance=0.1 (ours):       refresh reuse refresh reuse reuse reuse refresh ...

Which branches a reuse step computes is decided inside the graph, from scores and thresholds. With
`forecast_order=1` (ours) rows that are not computed are extrapolated instead of held. With a
`tolerance` (ours) a refresh comes when the evidence asks for it, at the latest by `max_interval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moeca_compile.policies.evidence import LaneEvidence
from moeca_compile.policies.protocol import Decision, Kind, Stored
from moeca_compile.policies.rows import RowPolicy

if TYPE_CHECKING:
    from moeca_compile.options import Options
    from moeca_compile.runtime.session import StepInfo


class MoecaPolicy(RowPolicy):
    """Refreshes before the interval is over only where a tolerance is given."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.tolerance = options.tolerance
        if self.tolerance is not None:
            self.interval = options.max_interval
        self._power = 1 + (options.forecast_order or 0)
        self._evidence: dict[int, LaneEvidence] = {}

    @classmethod
    def stores(cls, options: Options) -> Stored:
        """Rows, slopes where they are extrapolated, evidence where it steers."""
        return replace(super().stores(options), evidence=options.tolerance is not None)

    def choose(self, step: StepInfo, age: int) -> Decision:
        """Reuse, unless the error it would make is predicted to pass the tolerance."""
        if self.tolerance is not None and self._lane(step.lane).predicted(age) > self.tolerance:
            return Decision("refresh", "evidence")
        return Decision("reuse", "policy")

    def mix(self, step: StepInfo, kind: Kind) -> tuple[float, ...]:
        """As `RowPolicy`; notes what is about to run."""
        self._lane(step.lane).ran(kind)
        return super().mix(step, kind)

    def measured(self, lane: int, numbers: Sequence[float]) -> None:
        """Evidence of the lane's last step."""
        self._lane(lane).measured(numbers)

    def evidence(self, lane: int) -> float | None:
        """The error predicted last, as a share of the tolerance."""
        return None if self.tolerance is None else self._lane(lane).asked / self.tolerance

    def forget(self, lane: int | None = None) -> None:
        """Drop one lane's numbers, or all of them."""
        super().forget(lane)
        if lane is None:
            self._evidence.clear()
        else:
            self._evidence.pop(lane, None)

    def _lane(self, key: int) -> LaneEvidence:
        found = self._evidence.get(key)
        if found is None:
            found = self._evidence[key] = LaneEvidence(self._power)
        return found
