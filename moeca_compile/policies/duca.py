"""Steps that reuse whole layers alternate with steps that compute selected rows.

    interval=4:  refresh forecast reuse forecast refresh ...

DuCa: arXiv 2412.18911, section 3: aggressive steps skip the stack, conservative steps recompute
tokens. Here the rows of a conservative step are branches and tokens as `score` and `budget` (or
`tau`) select them; DuCa's own criterion, small value norms, is not offered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeca_compile.policies.protocol import Decision, Kind, Policy, Stored

if TYPE_CHECKING:
    from moeca_compile.options import Options
    from moeca_compile.runtime.session import StepInfo


class DucaPolicy(Policy):
    """Odd steps after a refresh hold all layers, even ones recompute rows."""

    @classmethod
    def stores(cls, options: Options) -> Stored:
        """Rows, and the layers' outputs as the last computed step left them."""
        return Stored(rows=True, layers=1)

    def choose(self, step: StepInfo, age: int) -> Decision:
        """Forecast (held layers) first, then rows, in turn."""
        if age % 2 == 0:
            return Decision("forecast", "aggressive")
        return Decision("reuse", "conservative")

    def mix(self, step: StepInfo, kind: Kind) -> tuple[float, ...]:
        """Held layers take the weight 1."""
        return (1.0,) if kind == "forecast" else ()
