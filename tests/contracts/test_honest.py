"""Contract "honest": every reported number is counted from what ran.

The rows that changed in the caches, and the float64 reference fed with the same selection, give the
same counts as `stats`.
"""

from __future__ import annotations

import json

import pytest
import torch

import moeca_compile
from graph_runs import compile_model, watched_call
from idioms import make, trajectory
from moeca_compile import Options
from moeca_compile.runtime.stats import Stats
from reference import Reference

ROWS = {"policy": "moeca"}
CASES = [
    ("I1", 2, {"score": "input_drift"}),
    ("I2", 4, {"score": "moeca"}),
    ("split", 1, {"budget": 0.2}),
    ("I1", 2, {"budget": 0.05}),
]


def case_name(case: tuple) -> str:
    return f"{case[0]}-{case[1]}-{'-'.join(map(str, case[2].values()))}"


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case_name(case), marks=() if case == CASES[0] else pytest.mark.slow)
        for case in CASES
    ],
)
def test_counts_are_those_of_the_rows_that_changed(graph_level: None, case: tuple) -> None:
    idiom, top_k, options = case
    model = make(idiom, top_k=top_k, depth=2, shared=1)
    calls = trajectory(model, 6, dx=0.1)
    reference = Reference(model, Options(**options))
    compiled = compile_model(model, calls[0], interval=4, **options)
    tokens, branches = 2 * 16, 2 * 16 * top_k
    seen = {"branches": [0, 0], "tokens": [0, 0], "unmatched": [0, 0], "dropped": [0, 0]}
    for call in calls:
        step = watched_call(compiled, *call)
        refresh = step.kind == "refresh"
        judge = reference.step(*call, refresh=refresh, forced=None if refresh else step.pairs)
        for number, layer in enumerate(judge.layers):
            seen["branches"][number] += branches if refresh else len(step.pairs[number])
            seen["tokens"][number] += tokens if refresh else len(step.attended[number])
            if not refresh:
                seen["unmatched"][number] += int((~layer.matched).sum())
                seen["dropped"][number] += int(layer.dropped.sum())
    stats = moeca_compile.stats(compiled)
    assert (stats.refresh_steps, stats.reuse_steps) == (2, 4)
    assert seen["branches"] == [layer.branches_computed for layer in stats.layers]
    assert seen["tokens"] == [layer.tokens_attended for layer in stats.layers]
    assert seen["tokens"] == [layer.shared_rows for layer in stats.layers]
    assert seen["unmatched"] == [layer.unmatched for layer in stats.layers]
    assert seen["dropped"] == [layer.dropped for layer in stats.layers]
    assert stats.unmatched > 0
    assert (stats.dropped > 0) == (options.get("budget") == 0.05)
    assert 2 * branches < seen["branches"][0] < 6 * branches
    check_totals(stats, steps=6, tokens=tokens, branches=branches)


def check_totals(stats: Stats, steps: int, tokens: int, branches: int) -> None:
    assert stats.steps == steps == stats.refresh_steps + stats.reuse_steps + stats.plain_steps
    assert [layer.branches_total for layer in stats.layers] == [steps * branches] * 2
    assert [layer.tokens_total for layer in stats.layers] == [steps * tokens] * 2
    for name in ("branches_total", "branches_computed", "tokens_total", "tokens_attended"):
        assert getattr(stats, name) == sum(getattr(layer, name) for layer in stats.layers)
    assert sum(stats.reasons.values()) == stats.refresh_steps
    assert 0 < stats.fixed_flops < stats.flops_computed < stats.flops_full
    assert stats.speedup_flops == stats.flops_full / stats.flops_computed > 1
    for layer in stats.layers:
        assert 0 < layer.flops_computed < layer.flops_full

    text, fields = str(stats), stats.to_dict()
    assert json.loads(json.dumps(fields)) == fields
    for layer in stats.layers:
        assert layer.name in text
        assert f"{layer.branches_computed}/{layer.branches_total}" in text
    assert fields["branches_computed"] == stats.branches_computed
    assert fields["flops_computed"] == stats.flops_computed


@pytest.mark.parametrize(
    "options", [{"interval": 1}, ROWS | {"warmup_steps": 9}], ids=["off", "refresh"]
)
def test_flops_are_equal_when_everything_is_computed(graph_level: None, options: dict) -> None:
    model = make("I8", depth=1)
    calls = trajectory(model, 3)
    compiled = compile_model(model, calls[0], **options)
    for call in calls:
        watched_call(compiled, *call)
    stats = moeca_compile.stats(compiled)
    assert stats.flops_computed == stats.flops_full > 0
    assert stats.branches_computed == stats.branches_total == 3 * 2 * 16 * 2
    assert stats.tokens_attended == stats.tokens_total == 3 * 2 * 16
    assert (stats.unmatched, stats.dropped, stats.speedup_flops) == (0, 0, 1.0)


def test_flops_of_a_full_step_are_those_of_the_model(graph_level: None) -> None:
    """Against the formula: two FLOPs for each multiplication of the matrix products."""
    model = make("I1", top_k=2, depth=1, shared=1)
    calls = trajectory(model, 1)
    compiled = compile_model(model, calls[0])
    watched_call(compiled, *calls[0])
    batch, tokens, dim, hidden, experts = 2, 16, 32, 48, 8
    rows = batch * tokens
    expert = 2 * 2 * dim * hidden
    attention = 2 * dim * 3 * dim + 2 * dim * dim + 2 * 2 * tokens * dim
    layer = rows * (2 * expert + expert + attention)
    router = 2 * rows * dim * experts
    conditioning = 2 * batch * (dim * dim * 2 + dim * 6 * dim + dim * 2 * dim)
    ends = 2 * rows * 12 * dim * 2
    stats = moeca_compile.stats(compiled)
    assert stats.layers[0].flops_full == layer
    assert stats.flops_full == layer + router + conditioning + ends


def test_nothing_has_run_yet() -> None:

    compiled = torch.compile(make("I1"), backend="moeca")
    stats = moeca_compile.stats(compiled)
    assert (stats.steps, stats.branches_total, stats.cache_bytes) == (0, 0, 0)
    assert stats.speedup_flops == 1.0
    assert str(stats)
    with pytest.raises(TypeError, match="pass the compiled model"):
        moeca_compile.stats(lambda x: x)
