"""Token-wise caching: between refreshes a share of the tokens is computed, whole.

    interval=4, budget=0.1:   refresh reuse reuse reuse refresh ...
    a token's score:          small values + steps since it was computed + best of its cell

ToCa: arXiv 2410.05317, section 3.2. Rows go through the same cache as the branches of "moeca", so a
token whose experts have changed is computed before any other, whatever its score: another expert's
output is never served. Which of the paper's terms are taken: passes/selectors.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeca_compile.policies.protocol import Decision
from moeca_compile.policies.rows import RowPolicy

if TYPE_CHECKING:
    from moeca_compile.options import Options
    from moeca_compile.runtime.session import StepInfo


class TocaPolicy(RowPolicy):
    """All branches of a token rank alike; `score` and `alpha` are not read."""

    @classmethod
    def selector(cls, options: Options) -> str:
        """Token scores."""
        return "toca"

    def choose(self, step: StepInfo, age: int) -> Decision:
        """Always reuse; see `Policy.choose`."""
        return Decision("reuse", "policy")
