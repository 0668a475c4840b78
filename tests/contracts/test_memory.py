"""Contract "bounded", bytes: a limit is kept by leaving out layers, which are then exact; rows in
another dtype take the bytes that were announced, and leave refreshes exact."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import moeca_compile
from contracts.generations import assert_fresh, difference, run
from graph_runs import compile_model, only_entry, use_graph_level, watched_call
from idioms import make, trajectory
from moeca_compile import Options
from moeca_compile.calibration.measure import graph_key
from moeca_compile.passes.cache_plan import ROW_KINDS
from moeca_compile.torch_compat import without_kernels
from reference import Reference

EVERYTHING = {"interval": 4, "budget": 1.0, "order": "attention_first"}


@pytest.fixture
def model_and_calls() -> Iterator[tuple[Any, list[Any]]]:
    model = make("I8", depth=2, num_experts=4)
    with without_kernels():
        yield model, trajectory(model, 4, dx=0.05)


def sizes(model: Any, call: Any, **options: Any) -> Any:
    compiled = torch.compile(model, backend="moeca", options=options)
    return moeca_compile.explain(compiled, *call)


def test_a_limit_leaves_out_a_layer_and_the_others_equal_the_reference(
    model_and_calls: tuple[Any, list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    model, calls = model_and_calls
    whole = sizes(model, calls[0], interval=4).cache_bytes
    options = {"interval": 4, "max_cache_bytes": 2 * whole // 3}
    with caplog.at_level(logging.WARNING, "moeca_compile"):
        compiled = compile_model(model, calls[0], **options)
        steps = [watched_call(compiled, *call) for call in calls]
    assert "computed as written in every step: blocks.1.moe.experts" in caplog.text
    entry, stats = only_entry(compiled), moeca_compile.stats(compiled)
    assert stats.cache_bytes == entry.cache_bytes == whole // 2 <= options["max_cache_bytes"]
    assert stats.left_out == ("blocks.1.moe.experts",) and "blocks.1.moe.experts" in str(stats)
    assert [layer.name for layer in stats.layers] == ["blocks.0.moe.experts"]
    reference = Reference(model, Options(**options), uncached=[1])
    for step, call in zip(steps, calls):
        forced = None if step.kind == "refresh" else [*step.pairs, set()]
        judge = reference.step(*call, refresh=step.kind == "refresh", forced=forced)
        assert not judge.disputed[0]
        error = (step.output.double() - judge.output).norm() / judge.output.norm()
        assert error <= 1e-5
    assert [step.kind for step in steps] == ["refresh", "reuse", "reuse", "reuse"]


@pytest.mark.slow
def test_explain_says_which_layers_are_left_out_and_what_that_costs(
    model_and_calls: tuple[Any, list[Any]],
) -> None:
    model, calls = model_and_calls
    free = sizes(model, calls[0], budget=0.2)
    tight = sizes(model, calls[0], budget=0.2, max_cache_bytes=free.cache_bytes - 1)
    assert tight.cache_bytes == free.cache_bytes // 2
    assert [r.reason for r in tight.regions] == ["", "", "max_cache_bytes", "max_cache_bytes"]
    assert "1 shared; not cached: max_cache_bytes" in str(tight)
    assert tight.prediction is not None and free.prediction is not None
    assert tight.prediction.flops_full == free.prediction.flops_full
    assert tight.prediction.flops_cached_max > 1.5 * free.prediction.flops_cached_max


@pytest.mark.parametrize(
    "policy",
    ["moeca", *(pytest.param(p, marks=pytest.mark.slow) for p in ("fora", "auto", "teacache"))],
)
def test_no_bytes_mean_no_caching_and_no_failure(
    model_and_calls: tuple[Any, list[Any]], policy: str
) -> None:
    model, calls = model_and_calls
    compiled = compile_model(model, calls[0], policy=policy, max_cache_bytes=0)
    for call in calls[:2]:
        ran = run(compiled, *call)
        assert ran.kind == "plain" and difference(ran.output, model, *call) <= 1e-5
    assert moeca_compile.stats(compiled).cache_bytes == 0


@pytest.mark.slow
def test_layers_are_left_out_of_forecasts_too(model_and_calls: tuple[Any, list[Any]]) -> None:
    model, calls = model_and_calls
    whole = sizes(model, calls[0], policy="fora").cache_bytes
    compiled = compile_model(model, calls[0], policy="fora", max_cache_bytes=whole - 1)
    for call in calls[:2]:
        with torch.no_grad():
            compiled(*call)
    stats = moeca_compile.stats(compiled)
    assert stats.forecast_steps == 1 and stats.cache_bytes == whole // 2
    assert stats.left_out == ("blocks.1.moe.experts",)


def test_rows_in_another_dtype(model_and_calls: tuple[Any, list[Any]]) -> None:
    model = make("I8", depth=1, num_experts=4)
    calls = trajectory(model, 2, dx=0.05)
    compiled = compile_model(model, calls[0], interval=4, cache_dtype="bfloat16")
    full = compile_model(model, calls[0], interval=4)
    assert_fresh(run(compiled, *calls[0]), model, *calls[0])
    run(full, *calls[0])
    entry = only_entry(compiled)
    kinds = entry.store.layout.nbytes_by_kind()
    wide = only_entry(full).store.layout.nbytes_by_kind()
    for kind, count in kinds.items():
        halved = kind in ROW_KINDS and kind != "norm"
        assert count == (wide[kind] // 2 if halved else wide[kind]), kind
    assert sizes(model, calls[0], cache_dtype="bfloat16").cache_bytes == entry.store.nbytes
    rounded, exact = (run(each, *calls[1]).output for each in (compiled, full))
    error = float((rounded - exact).norm() / exact.norm())
    assert 1e-6 < error <= 2e-2, "rounding of 2^-9 in every cached row, and it shows"


@pytest.mark.slow
def test_everything_computed_is_only_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    use_graph_level(monkeypatch)
    model = make("split", depth=1, num_experts=4)
    calls = trajectory(model, 2, dx=0.05)
    compiled = compile_model(model, calls[0], cache_dtype="bfloat16", **EVERYTHING)
    for call in calls[:2]:
        ran = run(compiled, *call)
    assert ran.kind == "reuse"
    assert 1e-6 < difference(ran.output, model, *calls[1]) <= 2e-2


def test_settings_that_need_other_graphs_are_kept_apart() -> None:
    keys = [
        graph_key(Options(**each))  # type: ignore[arg-type]
        for each in ({}, {"cache_dtype": "bfloat16"}, {"max_cache_bytes": 9}, {"policy": "fora"},
                     {"policy": "fora", "max_cache_bytes": 9})
    ]  # fmt: skip
    assert len(set(keys)) == 5
