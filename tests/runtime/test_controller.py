"""The contracts "fresh" and "bounded" on simulated generations, and the policy registry."""

from __future__ import annotations

import pytest

from moeca_compile.errors import OptionsError
from moeca_compile.options import Options
from moeca_compile.policies import POLICIES, find_policy
from moeca_compile.policies.protocol import Decision
from moeca_compile.runtime.controller import Controller, LaneAges
from moeca_compile.runtime.session import SessionTracker, StepInfo
from runtime.schedules import euler, heun


def info(step: int, fresh: bool = False, reason: str = "continues") -> StepInfo:
    return StepInfo(0, 0, step, fresh, reason, fresh, 0.5)


@pytest.mark.parametrize("interval", [1, 2, 3, 4, 7])
def test_kinds_over_a_generation(interval: int) -> None:
    tracker, ages = SessionTracker(), LaneAges()
    controller = Controller(Options(interval=interval))
    kinds = []
    for t, x in euler(20):
        step = tracker.observe(t, (), x)
        age = ages.started(step.lane)
        decision = controller.decide(step, age)
        ages.ran(step.lane, decision.kind, age)
        kinds.append(decision.kind)
    expected = ["refresh" if i % interval == 0 else "reuse" for i in range(20)]
    assert kinds == (["plain"] * 20 if interval == 1 else expected)


def test_rows_never_get_older_than_the_interval_allows() -> None:
    for interval in range(2, 8):
        tracker, ages = SessionTracker(), LaneAges()
        controller = Controller(Options(interval=interval))
        written: dict[int, int] = {}
        calls: dict[int, int] = {}
        for t, x in heun(20) + euler(30, seed=1):
            for label in (0, 1):
                step = tracker.observe(t, (label,), x)
                now = calls[step.lane] = calls.get(step.lane, -1) + 1
                age = ages.started(step.lane)
                decision = controller.decide(step, age)
                if decision.kind == "reuse":
                    assert now - written[step.lane] <= interval - 1
                else:
                    written[step.lane] = now
                ages.ran(step.lane, decision.kind, age)


def test_reasons_and_their_order() -> None:
    controller = Controller(Options(interval=4, warmup_steps=2))
    assert controller.decide(info(5, True, "sample_changed"), 0) == Decision(
        "refresh", "sample_changed"
    )
    assert controller.decide(info(5), None) == Decision("refresh", "no_rows")
    assert controller.decide(info(1), 0) == Decision("refresh", "warmup")
    assert controller.decide(info(2), 3) == Decision("refresh", "interval")
    assert controller.decide(info(2), 2) == Decision("reuse", "policy")


def test_interval_one_is_plain_even_when_fresh() -> None:
    assert Controller(Options(interval=1)).decide(info(0, True, "new_lane"), None).kind == "plain"


def test_a_step_that_raised_leaves_no_rows() -> None:
    ages = LaneAges()
    ages.ran(0, "refresh", ages.started(0))
    assert ages.age(0) == 0
    age = ages.started(0)
    assert age == 0 and ages.age(0) is None  # the variant raises here; `ran` is never called
    assert ages.started(0) is None


def test_ages_are_per_lane_and_can_be_forgotten() -> None:
    ages = LaneAges()
    for lane in (0, 1):
        ages.ran(lane, "refresh", None)
    ages.ran(0, "reuse", ages.started(0))
    assert (ages.age(0), ages.age(1)) == (1, 0)
    ages.ran(1, "plain", ages.started(1))
    assert ages.age(1) == 1
    ages.forget(0)
    assert (ages.age(0), ages.age(1)) == (None, 1)
    ages.forget()
    assert ages.age(1) is None
    ages.ran(2, "plain", None)
    assert ages.age(2) is None  # a plain step writes no rows


def test_registry() -> None:
    assert find_policy("moeca") is POLICIES["moeca"]
    with pytest.raises(OptionsError, match="'moeka'.*did you mean 'moeca'"):
        find_policy("moeka")
