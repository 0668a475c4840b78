"""Candidates: what the command line says, what is measured without being asked."""

from __future__ import annotations

import pytest

from moeca_compile import OptionsError
from moeca_compile.bench.candidates import (
    Candidate,
    default_candidates,
    fewer_steps,
    quick_candidates,
)
from moeca_compile.policies import POLICIES


def test_parse_tells_options_from_steps() -> None:
    both = Candidate.parse("policy=moeca, interval=3,budget=0.1,score=moeca,steps=25")
    assert both.options == {"policy": "moeca", "interval": 3, "budget": 0.1, "score": "moeca"}
    assert both.steps == 25
    assert both.name == "moeca interval=3 budget=0.1 score=moeca 25 steps"
    steps = Candidate.parse("steps=10")
    assert (steps.options, steps.policy, steps.name) == (None, "fewer steps", "10 steps")
    assert Candidate().name == Candidate().policy == "full"


def test_order_of_options_is_no_other_candidate() -> None:
    left, right = Candidate.parse("interval=3,tau=0.5"), Candidate.parse("tau=0.5,interval=3")
    assert left.identity == right.identity
    assert left.identity != Candidate.parse("interval=3,tau=0.6").identity


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("interval", "expected name=value, got 'interval'"),
        ("intervall=3", "did you mean 'interval'"),
        ("policy=forra", "unknown"),
        ("interval=0", ">= 1"),
        ("steps=0", "expected steps to be 1 or more"),
        ("steps=many", "expected steps to be 1 or more"),
    ],
)
def test_wrong_candidates_say_why(text: str, message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        Candidate.parse(text)


def test_defaults_hold_every_policy_once() -> None:
    choice = default_candidates()
    assert {c.policy for c in choice.candidates} == set(POLICIES)
    assert len({c.identity for c in choice.candidates}) == len(choice.candidates)
    assert choice.left_out == {}
    only = default_candidates(["moeca"])
    assert {c.policy for c in only.candidates} == {"moeca"}
    assert 0 < len(quick_candidates().candidates) < len(choice.candidates)


def test_what_this_version_does_not_know_is_named() -> None:
    choice = default_candidates(["of_another_version"])
    assert choice.candidates == ()
    assert all("unknown" in why for why in choice.left_out.values())


def test_fewer_steps_are_fewer_and_distinct() -> None:
    counts = [c.steps for c in fewer_steps(50)]
    assert counts == [33, 25, 20, 17, 12, 10]
    assert [c.steps for c in fewer_steps(3)] == [2, 1]
    assert fewer_steps(1) == ()
