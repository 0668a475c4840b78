"""Everything measured so far, and the best of it.

trials = Trials(target, seeds=[0, 1])
trials.add(options, 0, Tradeoff(3.1, 41.0))
trials.best(), trials.front()

A setting is measured on the first seed. The others are only asked about it once it looks like the
best: a setting that loses on one seed is not worth the time.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from .target import Target, Tradeoff, worst


@dataclass
class Trial:
    """One setting. made: by seed. origin: "bisect" or "optuna". error: why it could not run."""

    options: dict[str, Any]
    origin: str
    made: dict[int, Tradeoff] = field(default_factory=dict)
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable, but for infinite PSNR."""
        seeds = {str(s): {"speedup": m.speedup, "psnr_db": m.psnr_db} for s, m in self.made.items()}
        return {"options": self.options, "origin": self.origin, "seeds": seeds, "error": self.error}


@dataclass
class Trials:
    """In the order they were made. seeds: those a setting must reach the target on."""

    target: Target
    seeds: list[int]
    _found: dict[str, Trial] = field(default_factory=dict)

    def __iter__(self) -> Any:
        return iter(self._found.values())

    def get(self, options: dict[str, Any], origin: str) -> Trial:
        """The trial of these options, a new one if there is none."""
        key = json.dumps(options, sort_keys=True)
        return self._found.setdefault(key, Trial(options, origin))

    def score(self, trial: Trial) -> float:
        """By the seeds measured, see `Target.score`; minus infinity without any."""
        made = [trial.made[seed] for seed in self.seeds if seed in trial.made]
        return self.target.score(made) if made else -math.inf

    def first_score(self, trial: Trial) -> float:
        """By the first seed alone, on which every setting was measured."""
        made = trial.made.get(self.seeds[0])
        return -math.inf if made is None else self.target.score([made])

    def contender(self) -> Trial | None:
        """One to be measured on the other seeds: on the first it beats the best that was."""
        best = self.best()
        if best is None or self.missing(best):
            return best
        open_ = [t for t in self if t.made and not t.error and self.missing(t)]
        found = max(open_, key=self.first_score, default=None)
        if found is None:
            return None
        ahead = self.first_score(found) > self.first_score(best)
        instead = self.score(best) < 0 <= self.first_score(found)
        return found if ahead or instead else None

    def missing(self, trial: Trial) -> list[int]:
        """Seeds it was not measured on."""
        return [seed for seed in self.seeds if seed not in trial.made]

    def ranked(self) -> list[Trial]:
        """Best first, as far as measured; the earlier one where two are equal."""
        return sorted((t for t in self if t.made and not t.error), key=self.score, reverse=True)

    def best(self) -> Trial | None:
        """The best of those measured on every seed, else of all."""
        ranked = self.ranked()
        whole = [trial for trial in ranked if not self.missing(trial)]
        return next(iter(whole or ranked), None)

    def front(self) -> list[Trial]:
        """Those that no other one beats in both figures, by the worst of their seeds."""
        known = [(trial, worst(list(trial.made.values()))) for trial in self if trial.made]
        return [t for t, own in known if not any(_beats(other, own) for _, other in known)]


def _beats(left: Tradeoff, right: Tradeoff) -> bool:
    better = (left.speedup, left.psnr_db) != (right.speedup, right.psnr_db)
    return better and left.speedup >= right.speedup and left.psnr_db >= right.psnr_db
