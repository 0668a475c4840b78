"""The search: bisection on each policy's driver, optuna on its other knobs.

1. every policy with the first value of its knobs: where does its driver meet the target?
2. for the policies on the front: one knob changed at a time, then what optuna (TPE, seeded)
   proposes, each bisected again
3. the best is measured on a seed that was not searched with; if the target is missed there, that
   seed joins the others, and the next best has to hold on one more

A policy, or a proposal, is left as soon as it cannot beat the best there is (`Target.hopeless`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .measure import Measure
from .search_space import Space
from .target import SLACK, Tradeoff
from .time_limit import TimeLimit
from .trials import Trial, Trials

log = logging.getLogger(__name__)
PATIENCE = 10  # proposals in a row that were measured and brought nothing
MAX_PROPOSALS = 100  # those included that are known already or would have to compile for too long
CLOSE = 0.01  # share of the target: near enough to stop bisecting
HELD_OUT_ROUNDS = 3


@dataclass
class Search:
    """One run. max_trials: settings measured at most. on_trial: told after every one."""

    measure: Measure
    trials: Trials
    spaces: dict[str, Space]
    limit: TimeLimit
    max_trials: int
    seed: int
    on_trial: Callable[[Trial], None] = lambda _: None

    def run(self) -> Trial | None:
        """Steps 1 and 2; the best setting, None if none could be run."""
        reached: dict[str, Trial] = {}
        for policy, space in self.spaces.items():
            found = self._bisect(policy, space, {c.name: c.values[0] for c in space.others})
            if found is not None:
                reached[policy] = found
                self._confirm()
        if reached:
            self._explore()
        return self.trials.best()

    def hold_out(self, seed: int) -> tuple[int, Tradeoff, Trial] | None:
        """Step 3, from `seed` on: the seed, what was measured on it, and the setting."""
        found = None
        for _ in range(HELD_OUT_ROUNDS):
            self._confirm()
            best = self.trials.best()
            if best is None or (found is not None and not self._affords(best.options)):
                return found
            made = self.measure.run(best.options, seed)
            found = (seed, made, best)
            if self.trials.target.reached(made, SLACK) or not self._reaches(best):
                return found
            log.info("missed the target on seed %d: %s; it joins the search", seed, made)
            best.made[seed] = made
            self.trials.seeds.append(seed)
            seed += 1
        return found

    def _reaches(self, trial: Trial) -> bool:
        return self.trials.score(trial) >= 0

    def _bisect(
        self, policy: str, space: Space, others: dict[str, Any], origin: str = "bisect"
    ) -> Trial | None:
        """The best setting along the driver; None if none was measured.

        Gallops from the start to both sides of the target, then halves.
        """
        values, target = space.driver.values, self.trials.target
        low, high = -1, len(values)  # slow enough to be good; fast enough to be bad
        at, stride, found = self._start(policy, space), max(1, len(values) // 12), None
        while low + 1 < high:
            options = {"policy": policy, **others, space.driver.name: values[at]}
            trial = self._try(options, origin)
            if trial is None or trial.error:
                return found
            made = trial.made[self.trials.seeds[0]]
            if found is None or self.trials.score(trial) > self.trials.score(found):
                found = trial
            if self._hopeless(trial, made) or _close(target.constrained(made), target.value):
                return found
            if target.reached(made) == (target.name == "speedup"):
                high = at
            else:
                low = at
            between = low >= 0 and high < len(values)
            at = (low + high) // 2 if between else _gallop(low, high, stride, len(values))
            stride *= 2
        return found

    def _start(self, policy: str, space: Space) -> int:
        """Where this policy was best so far, else the table's start."""
        name = space.driver.name
        own = [t for t in self.trials.ranked() if t.options["policy"] == policy]
        return space.driver.values.index(own[0].options[name] if own else space.driver.start)

    def _hopeless(self, trial: Trial, made: Tradeoff) -> bool:
        best = self.trials.best()
        others = best is not None and best.options["policy"] != trial.options["policy"]
        if best is None or not (others or trial.origin == "optuna"):
            return False
        return self.trials.target.hopeless(made, self.trials.first_score(best))

    def _try(self, options: dict[str, Any], origin: str) -> Trial | None:
        """Measured on the first seed, or known already; None if it cannot be afforded."""
        trial = self.trials.get(options, origin)
        if trial.error or self.trials.seeds[0] in trial.made:
            return trial
        count = self._count()
        first = count == 0  # without any there is nothing to return
        if count >= self.max_trials or not (first or self._affords(options)):
            return None
        return self._measured(trial, self.trials.seeds[0])

    def _count(self) -> int:
        return sum(1 for each in self.trials if each.made or each.error)

    def _affords(self, options: dict[str, Any]) -> bool:
        return self.limit.affords(self.measure.estimate(options))

    def _measured(self, trial: Trial, seed: int) -> Trial:
        try:
            trial.made[seed] = self.measure.run(trial.options, seed)
        except Exception as error:  # a policy that fails on this model must not end the search
            trial.error = f"{type(error).__name__}: {error}"
            log.info("%s failed", trial.options, exc_info=True)
        self.limit.reserve = self.measure.reserve()
        self.on_trial(trial)
        return trial

    def _confirm(self) -> None:
        """Measure on the other seeds whatever might be the best."""
        while (trial := self.trials.contender()) is not None:
            for seed in self.trials.missing(trial):
                if not self._affords(trial.options):
                    return
                if self._measured(trial, seed).error:
                    break

    def _explore(self) -> None:
        """Proposals for the knobs without order, until patience, trials or time are spent."""
        from .proposals import Proposals

        front = {trial.options["policy"] for trial in self.trials.front()}
        spaces = {p: s for p, s in self.spaces.items() if p in front and s.others}
        if not spaces:
            return
        proposals, idle = Proposals(spaces, self.trials, self.seed), 0
        for _ in range(MAX_PROPOSALS):
            best, known = self.trials.best(), self._count()
            before = -math.inf if best is None else self.trials.score(best)
            policy, others = proposals.ask()
            found = self._bisect(policy, spaces[policy], others, "optuna")
            proposals.tell(None if found is None else self.trials.score(found))
            if self._count() >= self.max_trials or not self.limit.affords(self.measure.run_seconds):
                return
            self._confirm()
            best = self.trials.best()
            better = best is not None and self.trials.score(best) > before
            idle = 0 if better else idle + (self._count() > known)
            if idle >= PATIENCE:
                return


def _close(found: float, wanted: float) -> bool:
    return wanted <= found <= wanted * (1 + CLOSE)


def _gallop(low: int, high: int, stride: int, count: int) -> int:
    """The next place on the side where the target has not been passed yet."""
    if high == count:
        return min(low + stride, count - 1)
    return max(high - stride, 0)
