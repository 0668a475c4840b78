"""One setting to measure, and the settings measured unless others are asked for.

Candidate.parse("policy=fora,interval=3")   options of the backend
Candidate.parse("steps=25")                 the model as it is, fewer steps
Candidate.parse("policy=fora,steps=25")     both

A setting the installed version does not know is left out and named: the table of defaults holds
the policies there are, and no result.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import OptionsError
from ..options import Options
from ..policies import POLICIES

FULL = "full"
STEPS = "fewer steps"
STEP_RATIOS = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0)

# Chosen to land between 1.8 and 5 times fewer FLOPs; a policy not named here gets INTERVALS.
INTERVALS: tuple[dict[str, Any], ...] = tuple({"interval": n} for n in (2, 3, 4, 5))
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "moeca": (
        {"interval": 4, "score": "moeca", "budget": 0.2},
        {"interval": 4, "score": "moeca", "budget": 0.1},
        {"interval": 4, "score": "moeca", "budget": 0.05},
        {"interval": 8, "score": "moeca", "budget": 0.05},
        {"interval": 4, "score": "input_drift", "budget": 0.2},
        {"interval": 4, "score": "input_drift", "budget": 0.1},
        {"interval": 8, "score": "input_drift", "budget": 0.05},
        *({"interval": n, "tau": 1e9, "forecast_order": 1} for n in (2, 3, 4)),
        {"interval": 4, "budget": 0.1, "forecast_order": 1},
        *({"tolerance": v, "max_interval": 6, "budget": 0.1} for v in (0.1, 0.2, 0.4)),
        *(
            {"tolerance": v, "max_interval": 6, "budget": 0.1, "forecast_order": 1}
            for v in (0.1, 0.2, 0.4)
        ),
    ),
    "toca": (
        {"interval": 3, "budget": 0.1},
        {"interval": 4, "budget": 0.1},
        {"interval": 6, "budget": 0.05},
    ),
    "duca": (
        {"interval": 3, "budget": 0.1},
        {"interval": 4, "budget": 0.1},
        {"interval": 6, "budget": 0.05},
    ),
    "teacache": tuple({"tolerance": value} for value in (0.03, 0.06, 0.1, 0.15, 0.25)),
    "taylorseer": (
        *({"interval": n, "forecast_order": 1} for n in (2, 3, 4, 5)),
        *({"interval": n, "forecast_order": 2} for n in (3, 4, 5)),
    ),
    "output_forecast": (
        *({"interval": n, "forecast_order": 1} for n in (2, 3, 4, 5)),
        *({"tolerance": v, "forecast_order": 1} for v in (0.02, 0.05, 0.1, 0.2)),
    ),
    "auto": (
        {},
        *({"tolerance": value} for value in (0.03, 0.04, 0.045, 0.06, 0.12, 0.2)),
        *({"tolerance": value, "max_interval": 6} for value in (0.2, 0.3)),
    ),
}
# One each that compiles little; what else there is can be asked for by name.
QUICK: dict[str, dict[str, Any]] = {
    "moeca": {"interval": 4, "score": "moeca", "budget": 0.1},
    "fora": {"interval": 3},
}


@dataclass(frozen=True)
class Candidate:
    """options: of the backend, None for the model without caching; steps: None for the default."""

    options: dict[str, Any] | None = None
    steps: int | None = None

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """From `name=value,name=value`. Raises OptionsError for what the backend does not accept.

        `steps` is the sampler's, everything else an option of the backend.
        """
        given: dict[str, Any] = {}
        for part in text.split(","):
            name, equals, value = part.strip().partition("=")
            if not equals or not name:
                raise OptionsError(f"candidate {text!r}: expected name=value, got {part.strip()!r}")
            given[name] = _value(value)
        steps = given.pop("steps", None)
        if steps is not None and (type(steps) is not int or steps < 1):
            raise OptionsError(f"candidate {text!r}: expected steps to be 1 or more, got {steps!r}")
        if given:
            Options.parse(given)
        return cls(given or None, steps)

    @property
    def policy(self) -> str:
        """The family in tables and plots: a policy's name, "fewer steps" or "full"."""
        if self.options is None:
            return FULL if self.steps is None else STEPS
        return Options.parse(self.options).policy

    @property
    def name(self) -> str:
        """Short and unique: `fora interval=3`, `25 steps`, `full`."""
        steps = [] if self.steps is None else [f"{self.steps} steps"]
        if self.options is None:
            return " ".join(steps) or FULL
        others = [f"{k}={v}" for k, v in self.options.items() if k != "policy"]
        return " ".join([self.policy, *others, *steps])

    @property
    def identity(self) -> str:
        """The same for the same setting, in whatever order its options were given."""
        return json.dumps([self.options, self.steps], sort_keys=True)


@dataclass(frozen=True)
class Choice:
    """What will be measured, and what was left out: candidate text -> why."""

    candidates: tuple[Candidate, ...]
    left_out: dict[str, str]


def default_candidates(policies: Sequence[str] | None = None) -> Choice:
    """Every setting of every policy there is, or of those named. Fewer steps are added later."""
    chosen: list[Candidate] = []
    left_out: dict[str, str] = {}
    for policy in POLICIES if policies is None else policies:
        for settings in SETTINGS.get(policy, INTERVALS):
            options = {"policy": policy, **settings}
            try:
                Options.parse(options)
            except OptionsError as error:
                left_out[" ".join(f"{k}={v}" for k, v in options.items())] = str(error)
            else:
                chosen.append(Candidate(options))
    return Choice(tuple(chosen), left_out)


def quick_candidates() -> Choice:
    """The default policy as it comes, and few rivals: compiling is what takes the time."""
    default = Options().policy
    chosen = {default: {}, **QUICK}
    return Choice(tuple(Candidate({"policy": p, **chosen[p]}) for p in chosen if p in POLICIES), {})


def fewer_steps(default: int, ratios: Sequence[float] = STEP_RATIOS) -> tuple[Candidate, ...]:
    """The baseline that is always measured: `default` steps divided by each ratio."""
    counts = dict.fromkeys(max(1, round(default / ratio)) for ratio in ratios)
    return tuple(Candidate(steps=count) for count in counts if count < default)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
