"""Steps that reuse whole layers alternate with steps that compute selected tokens.

    interval=4:  refresh forecast reuse forecast refresh ...

DuCa: arXiv 2412.18911v1, section 3: aggressive steps skip the stack, conservative steps recompute
the tokens with the smallest value norms, as many as `budget` (or `tau`) allows. The paper's second
version picks tokens at random instead, which is not offered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeca_compile.policies.protocol import Decision, Kind, Stored
from moeca_compile.policies.rows import RowPolicy

if TYPE_CHECKING:
    from moeca_compile.options import Options
    from moeca_compile.runtime.session import StepInfo


class DucaPolicy(RowPolicy):
    """Odd steps after a refresh hold all layers, even ones recompute rows."""

    @classmethod
    def stores(cls, options: Options) -> Stored:
        """Rows, held, and the layers' outputs as the last computed step left them."""
        return Stored(rows=True, layers=1)

    @classmethod
    def selector(cls, options: Options) -> str:
        """Value norms; `score` and `alpha` are not read."""
        return "value_norm"

    def choose(self, step: StepInfo, age: int) -> Decision:
        """Forecast (held layers) first, then rows, in turn."""
        if age % 2 == 0:
            return Decision("forecast", "aggressive")
        return Decision("reuse", "conservative")

    def mix(self, step: StepInfo, kind: Kind) -> tuple[float, ...]:
        """Held layers take the weight 1."""
        return (1.0,) if kind == "forecast" else ()
