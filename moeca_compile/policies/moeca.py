"""The published method: between two refreshes every step is a reuse step (paper, N = 4).

    interval=4:  refresh reuse reuse reuse refresh reuse ...

Which branches a reuse step computes is decided inside the graph, from scores and thresholds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeca_compile.policies.protocol import Decision, Policy

if TYPE_CHECKING:
    from moeca_compile.runtime.session import StepInfo


class MoecaPolicy(Policy):
    """Never refreshes before the interval is over."""

    def choose(self, step: StepInfo, age: int) -> Decision:
        """Always reuse; see `Policy.choose`."""
        return Decision("reuse", "policy")
