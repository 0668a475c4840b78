"""What a policy is asked, and what it may answer.

    step (which generation, lane, step), age of the lane's rows  ->  Decision("reuse", "policy")

A policy is only asked when rows may be read at all; it can ask for an earlier refresh, never for
a later one: the controller owns the contracts "fresh" and "bounded".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from moeca_compile.options import Options
    from moeca_compile.runtime.session import StepInfo

Kind = Literal["plain", "refresh", "reuse"]


@dataclass(frozen=True)
class Decision:
    """Which variant runs this step. `reason` is a short stable word counted in the stats."""

    kind: Kind
    reason: str


class Policy(Protocol):
    """Built once per compiled entry; holds no tensor."""

    def __init__(self, options: Options) -> None: ...

    def choose(self, step: StepInfo, age: int) -> Decision:
        """Refresh or reuse at `step`, with rows last refreshed `age + 1` steps ago."""
        ...
