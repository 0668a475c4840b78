"""Refreshes steered by evidence: what is predicted from it, and the schedule that follows."""

from __future__ import annotations

import math

import pytest

from moeca_compile.options import Options
from moeca_compile.policies.evidence import LaneEvidence
from moeca_compile.runtime.controller import Controller, LaneAges
from moeca_compile.runtime.session import StepInfo


def test_before_anything_was_compared_outputs_change_as_their_inputs_do() -> None:
    lane = LaneEvidence(power=1)
    lane.ran("refresh")
    lane.measured([math.nan, math.nan, math.nan])  # nothing earlier to compare with
    assert lane.predicted(0) == 0.0
    lane.ran("reuse")
    lane.measured([0.1, 0.02, 0.0])
    assert lane.predicted(1) == pytest.approx(0.24)  # twice the distance


@pytest.mark.parametrize(("power", "expected"), [(1, 0.3 * 4 / 3), (2, 0.3 * (4 / 3) ** 2)])
def test_the_error_seen_at_a_refresh_scales_what_follows(power: int, expected: float) -> None:
    lane = LaneEvidence(power)
    lane.ran("refresh")
    lane.measured([0.0, 0.0, 0.0])
    for _ in range(2):  # the second of these is the first with slopes behind it
        for kind in ("reuse", "reuse", "refresh"):
            lane.ran(kind)  # type: ignore[arg-type]
            lane.measured([0.2, 0.1, 0.3] if kind == "refresh" else [0.1, 0.0, 0.0])
    assert lane.predicted(2) == pytest.approx(0.3), "three calls apart, as it was seen"
    assert lane.predicted(3) == pytest.approx(expected)


def test_what_is_no_number_refreshes() -> None:
    lane = LaneEvidence(power=1)
    lane.ran("refresh")
    lane.ran("reuse")
    lane.measured([math.nan, 0.0, 0.0])
    assert lane.predicted(1) == math.inf


def schedule(tolerance: float, per_call: float, steps: int = 13, **options: object) -> list[str]:
    """Kinds of steps of a lane whose inputs drift by `per_call`, outputs half as much."""
    made = Options(policy="moeca", tolerance=tolerance, max_interval=5, **options)  # type: ignore[arg-type]
    controller, ages, found = Controller(made), LaneAges(), []
    since = 0
    for i in range(steps):
        step = StepInfo(0, 0, i, i == 0, "new_lane" if i == 0 else "continues", i == 0, 1 - i / 50)
        age = ages.started(0)
        decision = controller.decide(step, age)
        controller.policy.mix(step, decision.kind)
        ages.ran(0, decision.kind, age)
        since += 1
        drift, error = since * per_call, since * per_call / 2
        controller.policy.measured(0, [drift, 0.0, error if decision.kind == "refresh" else 0.0])
        since = 0 if decision.kind == "refresh" else since
        found.append(decision.kind)
    return found


def test_a_refresh_comes_when_the_prediction_passes_the_tolerance() -> None:
    """0.1 a call, first taken for the error itself, then halved: 0.05 a call, at most 0.16."""
    found = schedule(0.16, 0.1)
    assert found[:3] == ["refresh", "reuse", "refresh"]
    assert found[3:] == ["reuse", "reuse", "reuse", "refresh"] * 2 + ["reuse", "reuse"]


def test_never_later_than_the_longest_interval() -> None:
    assert schedule(100.0, 0.1) == (["refresh"] + ["reuse"] * 4) * 2 + ["refresh", "reuse", "reuse"]


def test_lanes_are_apart_and_forgotten() -> None:
    policy = Controller(Options(policy="moeca", tolerance=0.1)).policy
    step = StepInfo(0, 0, 1, False, "continues", False, 0.5)
    policy.mix(step, "refresh")
    policy.mix(step, "reuse")
    policy.measured(0, [1.0, 0.0, 0.0])
    other = StepInfo(0, 1, 1, False, "continues", False, 0.5)
    assert policy.choose(step, 1).kind == "refresh"
    assert policy.choose(other, 1).kind == "reuse"
    policy.forget(0)
    assert policy.choose(step, 1).kind == "reuse"
