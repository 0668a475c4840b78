"""Contract "oracle": a reuse step equals the float64 reference fed with the same cache.

Same selected branches (near ties of the selection rule excepted) and outputs within float32
rounding, for both scores, threshold and budget, on every idiom.
"""

from __future__ import annotations

import math

import pytest
import torch

from graph_runs import compile_model, use_graph_level, watched_call
from idioms import make, trajectory
from idioms.denoiser import Denoiser
from moeca_compile import Options
from moeca_compile.passes import run_experts
from reference import Forced, Reference

CASES = [
    # idiom, router, expert, top_k, shared, attention
    ("split", "softmax", "swiglu", 2, 1, "sdpa"),
    ("I1", "softmax", "mlp", 1, 0, "sdpa"),
    ("I1", "softmax", "swiglu", 2, 1, "manual"),
    ("I1", "sigmoid", "mlp", 4, 2, "rope"),
    ("I2", "sigmoid", "swiglu", 4, 1, "sdpa"),
    ("I8", "softmax_renorm", "swiglu", 2, 1, "rope"),
    ("I8", "topk_softmax", "mlp", 4, 0, "manual"),
    ("I3", "softmax", "mlp", 2, 1, "manual"),
    ("I4", "softmax", "mlp", 1, 1, "sdpa"),
    ("I4", "softmax", "swiglu", 2, 0, "rope"),
    ("I4", "softmax", "mlp", 3, 1, "sdpa"),
]
RULES = [
    {"score": score, "budget": budget}
    for score in ("moeca", "input_drift")
    for budget in (None, 0.15, 0.5)
]


def _parameters() -> list:
    """Every case with every rule; without the slow marker a few, a rule each."""
    out = []
    for i, case in enumerate(CASES):
        for j, rule in enumerate(RULES):
            marks = () if i == j and i not in (1, 3) else pytest.mark.slow
            name = "-".join(map(str, (*case, *rule.values())))
            out.append(pytest.param(case, rule, id=name, marks=marks))
    return out


def _model(case: tuple) -> Denoiser:
    idiom, router, expert, top_k, shared, attention = case
    return make(
        idiom, router=router, expert=expert, top_k=top_k, shared=shared, attention=attention
    )


@pytest.mark.parametrize(("case", "rule"), _parameters())
def test_reuse_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, case: tuple, rule: dict
) -> None:
    use_graph_level(monkeypatch)
    _assert_equals_the_reference(case, rule)


@pytest.mark.parametrize(
    ("case", "rule"),
    [(CASES[2], RULES[5]), pytest.param(CASES[9], RULES[0], marks=pytest.mark.slow)],
    ids=["I1", "I4"],
)
def test_experts_one_after_another_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, case: tuple, rule: dict
) -> None:
    """The form that large models get; see passes/run_experts.py."""
    use_graph_level(monkeypatch)
    monkeypatch.setattr(run_experts, "STAYS_IN_CACHE", 0)
    _assert_equals_the_reference(case, rule)


def _assert_equals_the_reference(case: tuple, rule: dict) -> None:
    model = _model(case)
    calls = trajectory(model, 5, dx=0.05)
    options = {"interval": 4, **rule}
    reference = Reference(model, Options(**options))
    compiled = compile_model(model, calls[0], **options)
    kinds = []
    for call in calls:
        step = watched_call(compiled, *call)
        refresh = step.kind == "refresh"
        judge = reference.step(*call, refresh=refresh, forced=None if refresh else step.pairs)
        kinds.append(step.kind)
        if not refresh:
            assert judge.disputed == [set()] * len(step.pairs)
            assert step.attended == [{token for token, _ in pairs} for pairs in step.pairs]
        error = (step.output.double() - judge.output).norm() / judge.output.norm()
        assert error <= 1e-5
    assert kinds == ["refresh", "reuse", "reuse", "reuse", "refresh"]


LINES = [
    # case, rule, order, forecast order
    pytest.param(CASES[0], {"budget": 0.15}, "router_first", marks=pytest.mark.slow),
    (CASES[3], {"score": "moeca"}, "router_first"),
    pytest.param(CASES[5], {"budget": 0.5}, "attention_first", marks=pytest.mark.slow),
    pytest.param(CASES[10], {}, "router_first", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("case", "rule", "order"), LINES, ids=["split", "I1", "I8", "I4"])
def test_extrapolated_rows_equal_the_reference(
    graph_level: None, case: tuple, rule: dict, order: str
) -> None:
    """Through a second refresh: slopes of refreshes, of reuse steps, none where experts changed."""
    model = _model(case)
    calls = trajectory(model, 7, dx=0.05)
    options = {"interval": 4, "forecast_order": 1, "order": order, "policy": "moeca", **rule}
    reference = Reference(model, Options(**options))
    held = Reference(model, Options(**{**options, "forecast_order": 0}))
    compiled = compile_model(model, calls[0], **options)
    apart = 0.0
    for index, call in enumerate(calls):
        step = watched_call(compiled, *call)
        refresh = index % 4 == 0
        assert step.kind == ("refresh" if refresh else "reuse")
        forced = [Forced(*sets) for sets in zip(step.pairs, step.attended, step.shared)]
        judge = reference.step(*call, refresh=refresh, forced=None if refresh else forced)
        other = held.step(*call, refresh=refresh)
        if not refresh:
            assert judge.disputed == [set()] * len(step.pairs)
        error = (step.output.double() - judge.output).norm() / judge.output.norm()
        assert error <= 1e-5
        apart = max(apart, float((other.output - judge.output).norm() / judge.output.norm()))
    assert apart > 1e-3, "holding would have done as well"


@pytest.mark.parametrize(
    ("policy", "case", "rule"),
    [
        ("toca", CASES[0], {"budget": 0.3}),
        pytest.param("toca", CASES[3], {"tau": 0.9}, marks=pytest.mark.slow),
        pytest.param(
            "toca",
            CASES[5],
            {"budget": 0.3, "order": "attention_first", "forecast_order": 1},
            marks=pytest.mark.slow,
        ),
        ("duca", CASES[2], {"budget": 0.3}),
    ],
)
def test_token_wise_policies_equal_the_reference(
    graph_level: None, policy: str, case: tuple, rule: dict
) -> None:
    """Steps that hold whole layers (duca) change no row and are none of this reference's."""
    model = _model(case)
    calls = trajectory(model, 6, dx=0.05)
    options = {"policy": policy, "interval": 5, **rule}
    reference = Reference(model, Options(**options))
    compiled = compile_model(model, calls[0], **options)
    computed = 0
    for index, call in enumerate(calls):
        held = policy == "duca" and index % 5 in (1, 3)
        if held:
            with torch.no_grad():
                compiled(*call)
            continue
        step = watched_call(compiled, *call)
        refresh = index % 5 == 0
        assert step.kind == ("refresh" if refresh else "reuse")
        forced = [Forced(*sets) for sets in zip(step.pairs, step.attended, step.shared)]
        judge = reference.step(*call, refresh=refresh, forced=None if refresh else forced)
        if not refresh:
            assert judge.disputed == [set()] * len(step.pairs)
            computed += sum(len(pairs) for pairs in step.pairs)
        error = (step.output.double() - judge.output).norm() / judge.output.norm()
        assert error <= 1e-5
    assert computed > 0


@pytest.mark.parametrize(
    ("case", "budget"),
    [(CASES[0], 0.15), pytest.param(CASES[5], 0.5, marks=pytest.mark.slow)],
    ids=["split", "I8"],
)
def test_attention_first_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, case: tuple, budget: float
) -> None:
    use_graph_level(monkeypatch)
    model = _model(case)
    calls = trajectory(model, 4, dx=0.05)
    options = {"interval": 4, "budget": budget, "order": "attention_first"}
    reference = Reference(model, Options(**options))
    compiled = compile_model(model, calls[0], **options)
    for index, call in enumerate(calls):
        step = watched_call(compiled, *call)
        assert step.kind == ("reuse" if index else "refresh")
        forced = [Forced(*sets) for sets in zip(step.pairs, step.attended, step.shared)]
        judge = reference.step(*call, refresh=index == 0, forced=forced if index else None)
        if index:
            assert judge.disputed == [set()] * len(step.pairs)
            assert all(not layer.disputed_tokens for layer in judge.layers)
            assert all(len(a) == math.ceil(budget * 16) * 2 for a in step.attended)
        error = (step.output.double() - judge.output).norm() / judge.output.norm()
        assert error <= 1e-5
