"""Which options of which policy are tried. One table; the search knows no policy by name.

SPACE["fora"]  ->  Space(driver=Driver("interval", (2, 3, ..., 16)), others=())

The driver is the one knob along which a policy gets faster and worse all the way: it is bisected
for every setting of the others, which optuna picks. What the installed version does not have,
policy, option or value, is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import OptionsError, name_nearest
from ..options import Options
from ..policies import POLICIES


@dataclass(frozen=True)
class Driver:
    """values: slow and good first, fast and bad last. start: where the first search begins."""

    name: str
    values: tuple[Any, ...]
    start: Any


@dataclass(frozen=True)
class Choice:
    """A knob without order. values: the search begins with the default, else with the first."""

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Space:
    """One policy: its driver, and every other knob that is searched."""

    driver: Driver
    others: tuple[Choice, ...] = ()


def _geometric(low: float, high: float, count: int) -> tuple[float, ...]:
    """`count` values from low to high, three significant digits each."""
    ratio = (high / low) ** (1 / (count - 1))
    return tuple(float(f"{low * ratio**i:.3g}") for i in range(count))


_INTERVAL = Driver("interval", (*range(2, 13), 14, 16, 20), 3)
_FORECAST_ERROR = Driver("tolerance", _geometric(0.002, 2.0, 49), 0.12)
_DRIFT = Driver("tolerance", _geometric(0.01, 3.0, 41), 0.15)
_LONGEST = Choice("max_interval", (6, 8, 4, 12, 20))
_WARMUP = Choice("warmup_steps", (0, 2, 4))
_FORECAST = (
    _LONGEST,
    Choice("prediction", ("auto", "output", "clean", "noise", "response")),
    Choice("corrector", (True, False)),
    Choice("forecast_order", (1, 2, 0)),
)
_BUDGET = Choice("budget", (0.1, 0.05, 0.2, 0.35))
_LINES = Choice("forecast_order", (1, 0))
_SCORE = Choice("score", ("input_drift", "moeca"))

# In the order of promise: where the time is short, the last ones are not tried.
SPACE: dict[str, Space] = {
    "auto": Space(_FORECAST_ERROR, (*_FORECAST, _WARMUP)),
    "taylorseer": Space(_INTERVAL, (Choice("forecast_order", (1, 2)), _WARMUP)),
    "fora": Space(_INTERVAL, (_WARMUP,)),
    "output_forecast": Space(_FORECAST_ERROR, (*_FORECAST, _WARMUP)),
    "teacache": Space(_DRIFT, (_LONGEST, _WARMUP)),
    "moeca": Space(_INTERVAL, (_BUDGET, _LINES, _SCORE, _WARMUP)),
    "toca": Space(_INTERVAL, (_BUDGET, _LINES, _WARMUP)),
    "duca": Space(_INTERVAL, (_BUDGET, _WARMUP)),
}


def available(policies: Sequence[str] | None = None) -> dict[str, Space]:
    """The table as far as the installed version has it, `policies` of it where given.

    Raises OptionsError for a policy that does not exist or that the table says nothing about.
    """
    known = {name: space for name, space in SPACE.items() if name in POLICIES}
    usable = {name: found for name, space in known.items() if (found := _usable(name, space))}
    for name in policies or ():
        if name not in usable:
            raise OptionsError(f"policies: cannot search {name!r}{name_nearest(name, usable)}")
    return {name: usable[name] for name in (policies or usable)}


def _usable(policy: str, space: Space) -> Space | None:
    """Without values that `Options` refuses; None without a driver."""
    driver = _accepted(policy, space.driver.name, space.driver.values)
    if not driver:
        return None
    others = [
        _default_first(Choice(c.name, _accepted(policy, c.name, c.values))) for c in space.others
    ]
    start = min(driver, key=lambda value: abs(value - space.driver.start))
    kept = tuple(choice for choice in others if choice.values)
    return Space(Driver(space.driver.name, driver, start), kept)


def _default_first(choice: Choice) -> Choice:
    default = getattr(Options(), choice.name, None)
    return Choice(choice.name, tuple(sorted(choice.values, key=lambda value: value != default)))


def _accepted(policy: str, name: str, values: Sequence[Any]) -> tuple[Any, ...]:
    if name not in {field.name for field in dataclasses.fields(Options)}:
        return ()
    return tuple(value for value in values if _parses({"policy": policy, name: value}))


def _parses(options: dict[str, Any]) -> bool:
    try:
        Options.parse(options)
    except OptionsError:
        return False
    return True
