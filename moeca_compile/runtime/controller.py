"""Which variant runs this step. Owns no tensor; a decision takes about a microsecond.

    interval=3, one lane:   call    0        1      2      3        4
                            age     None     0      1      2 -> 0   ...
                            runs    refresh  reuse  reuse  refresh  reuse

`age` counts the calls of a lane since its last refresh, so the oldest row a reuse step can read
was written `age + 1 <= interval - 1` calls ago (contract "bounded"; policies that steer their
refreshes state an interval of their own, `max_interval`).
"""

from __future__ import annotations

from moeca_compile.options import Options
from moeca_compile.policies import find_policy
from moeca_compile.policies.protocol import Decision, Kind
from moeca_compile.runtime.session import StepInfo

PLAIN = Decision("plain", "caching_off")
_NO_ROWS = Decision("refresh", "no_rows")
_WARMUP = Decision("refresh", "warmup")
_INTERVAL = Decision("refresh", "interval")


class Controller:
    """Enforces the contracts "fresh" and "bounded", then asks the policy."""

    def __init__(self, options: Options, available: frozenset[Kind] = frozenset()) -> None:
        """available: variants between refreshes that the model has caches for."""
        self.options = options
        self.policy = find_policy(options.policy)(options)
        self.policy.available = available

    def decide(self, step: StepInfo, age: int | None) -> Decision:
        """The variant to run.

        step: what the tracker made of this call. age: calls since the lane's last refresh
        (`LaneAges.age`), None when the lane holds no complete set of rows.
        """
        if self.options.interval == 1:
            return PLAIN
        if step.fresh or age is None:
            self.policy.forget(step.lane)
            return Decision("refresh", step.reason) if step.fresh else _NO_ROWS
        if step.step < self.options.warmup_steps:
            return _WARMUP
        if age + 1 >= self.policy.interval:
            return _INTERVAL
        return self.policy.choose(step, age)


class LaneAges:
    """Calls since the last refresh, per lane. A lane between `started` and `ran` has no rows:
    a step that raised half way leaves rows nobody may read."""

    def __init__(self) -> None:
        self._ages: dict[int, int] = {}

    def age(self, lane: int) -> int | None:
        """0 right after a refresh, +1 for every call since; None without rows."""
        return self._ages.get(lane)

    def started(self, lane: int) -> int | None:
        """To be called before a variant runs: takes the rows' age out until `ran` puts it back."""
        return self._ages.pop(lane, None)

    def ran(self, lane: int, kind: Kind, age: int | None) -> None:
        """To be called after the variant returned; `age` is what `started` gave."""
        if kind == "refresh":
            self._ages[lane] = 0
        elif age is not None:
            self._ages[lane] = age + 1

    def forget(self, lane: int | None = None) -> None:
        """Drop one lane's age, or all of them."""
        if lane is None:
            self._ages.clear()
        else:
            self._ages.pop(lane, None)
