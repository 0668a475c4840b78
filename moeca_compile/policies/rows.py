"""What all policies that reuse rows share: the clock by which rows are extrapolated.

    step                     refresh   reuse      refresh    reuse
    clock (time, known)      (0.9, 0)  (0.8, 1)   (0.7, 1)   (0.6, 1)
    rows of forecast_order=1 held      held       slope      along it

The numbers go to the graph as one small tensor (passes/row_forecast.py has what becomes of them).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeca_compile.policies.protocol import Kind, Policy, Stored
from moeca_compile.policies.taylorseer import abscissa

if TYPE_CHECKING:
    from moeca_compile.options import Options
    from moeca_compile.runtime.session import StepInfo


class RowPolicy(Policy):
    """Rows are held unless `forecast_order` is 1."""

    max_order = 1

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._known: set[int] = set()  # lanes that have rows of their own

    @classmethod
    def stores(cls, options: Options) -> Stored:
        """Rows, and their slopes where they are extrapolated."""
        return Stored(rows=True, slopes=options.forecast_order == 1)

    def mix(self, step: StepInfo, kind: Kind) -> tuple[float, ...]:
        """(time, whether the lane's rows before this step mean anything), or ()."""
        known = step.lane in self._known
        self._known.add(step.lane)
        if not self.stores(self.options).slopes:
            return ()
        return abscissa(step), float(known)

    def forget(self, lane: int | None = None) -> None:
        """Rows of one lane, or of all of them, are no more."""
        if lane is None:
            self._known.clear()
        else:
            self._known.discard(lane)
