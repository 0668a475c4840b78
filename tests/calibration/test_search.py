"""The search against a trade-off that is a formula: where it looks, and when it stops."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from moeca_compile.calibration.search import Search
from moeca_compile.calibration.search_space import Choice, Driver, Space
from moeca_compile.calibration.target import Target, Tradeoff
from moeca_compile.calibration.time_limit import TimeLimit
from moeca_compile.calibration.trials import Trials

VALUES = tuple(range(1, 41))
SPACES = {
    "good": Space(Driver("knob", VALUES, 5), (Choice("extra", (0, 1, 2, 3)),)),
    "bad": Space(Driver("knob", VALUES, 5), (Choice("extra", (0, 1, 2, 3)),)),
}
OFFSET = {"good": 0.0, "bad": -8.0}


@dataclass
class Formula:
    """speedup = knob / 4, PSNR falls with it; extra=2 is 3 dB better; compiling takes 50 s, a run
    2 s. hard: seeds on which everything is 8 dB worse."""

    hard: tuple[int, ...] = ()
    now: float = 0.0
    ran: list[tuple[dict[str, Any], int]] = field(default_factory=list)
    compiled: set[str] = field(default_factory=set)
    run_seconds: float = 2.0

    def clock(self) -> float:
        return self.now

    def estimate(self, options: dict[str, Any]) -> float:
        return 2.0 + (0.0 if options["policy"] in self.compiled else 50.0 * bool(self.compiled))

    def reserve(self) -> float:
        return 6.0

    def run(self, options: dict[str, Any], seed: int) -> Tradeoff:
        self.now += 2.0 if options["policy"] in self.compiled else 52.0
        self.compiled.add(options["policy"])
        self.ran.append((options, seed))
        psnr = 60.0 - options["knob"] + 3.0 * (options["extra"] == 2) + OFFSET[options["policy"]]
        return Tradeoff(options["knob"] / 4, psnr - 8.0 * (seed in self.hard))


def searching(formula: Formula, target: dict[str, float], seconds: float = 1e6) -> Search:
    limit = TimeLimit(seconds, formula.clock)
    trials = Trials(Target.parse(target), [0, 1])
    return Search(formula, trials, SPACES, limit, max_trials=60, seed=0)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("target", "knob"), [({"speedup": 3.0}, 12), ({"psnr_db": 40.0}, 23), ({"speedup": 8.0}, 32)]
)
def test_finds_the_edge_and_the_best_extra(target: dict[str, float], knob: int) -> None:
    formula = Formula()
    best = searching(formula, target).run()
    assert best is not None
    assert best.options == {"policy": "good", "extra": 2, "knob": knob}
    assert len(formula.ran) < 60


def test_a_hopeless_policy_is_left_at_once() -> None:
    formula = Formula()
    searching(formula, {"speedup": 3.0}).run()
    first = next(o for o, _ in formula.ran if o["policy"] == "bad")
    assert first == {"policy": "bad", "extra": 0, "knob": 5}  # 47 dB, where 48 are had at knob 12
    assert len([1 for options, _ in formula.ran if options["policy"] == "bad"]) == 1


@pytest.mark.parametrize("seconds", [1.0, 60.0, 90.0, 130.0, 200.0])
def test_time_is_kept(seconds: float) -> None:
    formula = Formula()
    search = searching(formula, {"speedup": 3.0}, seconds)
    search.run()
    assert formula.now <= max(seconds, 52.0)
    held_out = search.hold_out(2)
    assert held_out is not None and formula.now <= max(seconds, 52.0 + 4.0)


def test_a_seed_that_misses_joins_the_search() -> None:
    formula = Formula(hard=(2,))
    search = searching(formula, {"psnr_db": 40.0})
    before = search.run()
    held_out = search.hold_out(2)
    assert before is not None and held_out is not None
    seed, made, best = held_out
    assert seed == 3 and search.trials.seeds == [0, 1, 2]
    assert best.options["knob"] < before.options["knob"]
    assert best.made[2].psnr_db >= 40.0 and made.psnr_db >= 40.0 * 0.95


def test_a_setting_that_fails_does_not_end_the_search() -> None:
    class Failing(Formula):
        def run(self, options: dict[str, Any], seed: int) -> Tradeoff:
            if options["policy"] == "good":
                raise RuntimeError("no such layer")
            return super().run(options, seed)

    search = searching(Failing(), {"speedup": 3.0})
    best = search.run()
    assert best is not None and best.options["policy"] == "bad"
    assert [t.error for t in search.trials if t.error] == ["RuntimeError: no such layer"]
