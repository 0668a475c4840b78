"""What a policy is asked, and what it may answer.

    stores(options)   what a refresh keeps for it: rows, layer outputs, model outputs
    selector(options) how a reuse step ranks rows
    choose(step, age) -> Decision("skip", "policy")      one of the variants of a step
    mix(step, kind)   -> (1.5, -0.5)                     numbers the variant's graph takes
    measured(lane, numbers)                              what the last step's graph found

A policy is only asked when rows may be read at all; it can ask for an earlier refresh, never for
one later than `interval`: the controller owns the contracts "fresh" and "bounded". A policy holds
numbers of the host, never a tensor.

| kind     | computed                                    | read from the cache            |
|----------|---------------------------------------------|--------------------------------|
| plain    | everything                                  | nothing                        |
| refresh  | everything, and stored                      | history, to measure forecasts  |
| reuse    | selected rows of attention and experts      | the other rows                 |
| forecast | what lies outside attention and experts     | layer outputs, extrapolated    |
| skip     | nothing                                     | the model's output, extrapolated |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from moeca_compile.options import Options
    from moeca_compile.runtime.session import StepInfo

Kind = Literal["plain", "refresh", "reuse", "forecast", "skip"]


@dataclass(frozen=True)
class Decision:
    """Which variant runs this step. `reason` is a short stable word counted in the stats."""

    kind: Kind
    reason: str


@dataclass(frozen=True)
class Stored:
    """What is kept between steps. rows: of tokens and branches, for "reuse". slopes: of these rows,
    which are then extrapolated. evidence: whether steps that compute rows say how wrong reuse
    gets. layers: outputs of attention and experts at that many refreshes, for "forecast". outputs:
    outputs of the model, and samples, at that many refreshes, for "skip". input: of the first
    layer, at the last step.
    """

    rows: bool = False
    slopes: bool = False
    evidence: bool = False
    layers: int = 0
    outputs: int = 0
    input: bool = False


class Policy:
    """Built once per compiled entry. Defaults: nothing but rows is kept, graphs take no numbers.

    interval: calls from one refresh to the next at the latest. available: variants that the model
    has caches for. probes: whether each step's first input is measured before it is chosen.
    max_order: largest `forecast_order` it can be asked for.
    """

    probes = False
    max_order = 2  # of `forecast_order`

    def __init__(self, options: Options) -> None:
        self.options = options
        self.interval = options.interval
        self.available: frozenset[Kind] = frozenset()

    @classmethod
    def stores(cls, options: Options) -> Stored:
        """What its variants read; decides which caches a lane gets."""
        return Stored(rows=True)

    @classmethod
    def selector(cls, options: Options) -> str:
        """How reuse steps rank rows: a name in passes/selectors.py."""
        return options.score

    def choose(self, step: StepInfo, age: int) -> Decision:
        """The variant of `step`, with rows last refreshed `age + 1` calls ago."""
        raise NotImplementedError

    def mix(self, step: StepInfo, kind: Kind) -> tuple[float, ...]:
        """Coefficients for the graph of the variant that runs; called once per cached step."""
        return ()

    def measured(self, lane: int, numbers: Sequence[float]) -> None:
        """What the graph of the lane's last step found, read on the host one call later: inner
        products where outputs are stored (refreshes), evidence where that is."""

    def probed(self, lane: int, numbers: Sequence[float]) -> None:
        """Relative change of the first layer's input since the lane's last call."""

    def evidence(self, lane: int) -> float | None:
        """What speaks for an early refresh, as a share of the bound at which the policy wants one;
        None where it measures nothing. For reports only."""
        return None

    def forget(self, lane: int | None = None) -> None:
        """The rows of one lane, or of all of them, may not be read any more."""
