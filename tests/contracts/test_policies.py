"""The contracts for every policy: exact, against an eager reference, fresh, bounded, honest."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import moeca_compile
from graph_runs import compile_model, only_entry
from idioms import make, trajectory
from moeca_compile.passes.count_flops import FORMULAS
from moeca_compile.policies import POLICIES
from reference_forecast import ForecastReference, polynomial

KINDS = ("refresh", "reuse", "forecast", "skip", "plain")
# what makes every policy leave the beaten track within a few steps of the tiny models
FEW = ("auto", "moeca extrapolated and steered")
STEERED = {"forecast_order": 1, "tolerance": 10.0, "max_interval": 3}
VARIANTS = {"moeca extrapolated and steered": {"policy": "moeca", **STEERED}}
EVERY = [
    pytest.param(p, marks=() if p in FEW else pytest.mark.slow)
    for p in (*sorted(POLICIES), *VARIANTS)
]
EAGER = {"auto": {"tolerance": 10.0}, "teacache": {"tolerance": 10.0}}


class Dense(nn.Module):
    """A denoiser without experts: x [B, C, H, W], t [B] -> [B, C, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.time = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * torch.arange(1.0, 5.0)
        c = self.time(torch.cat([angle.sin(), angle.cos()], 1))[:, :, None, None]
        return self.leave(torch.nn.functional.silu(self.enter(x) * c))


def kind_of(compiled: Any, *call: Any) -> tuple[Tensor, str]:
    before = moeca_compile.stats(compiled)
    with torch.no_grad():
        output = compiled(*call)
    after = moeca_compile.stats(compiled)
    moved = [k for k in KINDS if getattr(after, f"{k}_steps") > getattr(before, f"{k}_steps")]
    assert len(moved) == 1
    return output, moved[0]


def generate(compiled: Any, calls: list[Any]) -> list[tuple[Tensor, str]]:
    return [kind_of(compiled, *call) for call in calls]


def options_of(policy: str, **more: Any) -> dict[str, Any]:
    given = VARIANTS.get(policy, {"policy": policy, **EAGER.get(policy, {})})
    return {"interval": 3, "max_interval": 3, **given, **more}


@pytest.mark.parametrize("policy", EVERY)
def test_interval_one_is_the_model(graph_level: None, policy: str) -> None:
    model = make("I1", depth=1)
    calls = trajectory(model, 3)
    compiled = compile_model(model, calls[0], **options_of(policy, interval=1))
    for call in calls:
        output, kind = kind_of(compiled, *call)
        assert kind == "plain"
        torch.testing.assert_close(output, model(*call), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("policy", "order"), [("fora", 0), ("taylorseer", 1), ("taylorseer", 2)])
@pytest.mark.parametrize("idiom", ["I1", "I8"])
def test_forecast_layers_equal_the_reference(
    graph_level: None, policy: str, order: int, idiom: str
) -> None:
    model = make(idiom, depth=2)
    calls = trajectory(model, 9, dx=0.05)
    options = options_of(policy, forecast_order=order)
    compiled = compile_model(model, calls[0], **options)
    reference = ForecastReference(model, order)
    seen = []
    for call in calls:
        output, kind = kind_of(compiled, *call)
        expected = reference.step(*call, refresh=kind == "refresh")
        torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
        seen.append(kind)
    assert seen == ["refresh", "forecast", "forecast"] * 3


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("dense", [False, True])
def test_skipped_steps_equal_the_reference(graph_level: None, order: int, dense: bool) -> None:
    model = Dense().eval().requires_grad_(False) if dense else make("I2", depth=1)
    calls = dense_calls(9) if dense else trajectory(model, 9, dx=0.05)  # type: ignore[arg-type]
    options = options_of("output_forecast", forecast_order=order, corrector=False)
    compiled = compile_model(model, calls[0], **options)
    points: list[tuple[float, Tensor]] = []
    seen = []
    for call in calls:
        output, kind = kind_of(compiled, *call)
        now = float(call[1][0])
        with torch.no_grad():
            eager = model(*call).double()
        if kind == "refresh":
            points = [(now, eager), *points][: order + 1]
        expected = eager if kind == "refresh" else polynomial(points, now)
        torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
        seen.append(kind)
    assert seen == ["refresh"] * 3 + ["skip", "skip", "refresh"] * 2


def fine_steps(model: nn.Module, steps: int, seed: int = 1) -> list[Any]:
    """The first calls of a longer generation: "auto" computes every step of a coarse noisy one."""
    return trajectory(model, 24, seed=seed)[:steps]  # type: ignore[arg-type]


def dense_calls(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, move = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    return [(x + 0.05 * i * move, torch.full((2,), 0.9 - 0.05 * i)) for i in range(steps)]


def test_the_corrector_is_the_stated_sum(graph_level: None) -> None:
    """Equal steps: what the skipped ones were handed wrongly is added to the refresh, whole."""
    model = Dense().eval().requires_grad_(False)
    calls = dense_calls(6)
    compiled = compile_model(model, calls[0], **options_of("output_forecast"))
    ran = generate(compiled, calls)
    assert [kind for _, kind in ran] == ["refresh"] * 3 + ["skip", "skip", "refresh"]
    last, new = model(*calls[2]).double(), model(*calls[5]).double()
    owed = torch.zeros_like(new)
    for i in (3, 4):
        share = (i - 2) / 3
        owed += (1 - share) * last + share * new - ran[i][0].double()
    torch.testing.assert_close(ran[5][0].double(), new + owed, rtol=1e-4, atol=1e-4)
    assert owed.norm() > 1e-3


@pytest.mark.parametrize("policy", EVERY)
def test_a_generation_reads_nothing_of_the_one_before(graph_level: None, policy: str) -> None:
    model = make("I1", depth=1)
    first, second = fine_steps(model, 7, seed=1), fine_steps(model, 7, seed=5)
    compiled = compile_model(model, first[0], **options_of(policy))
    generate(compiled, first)
    after = generate(compiled, second)
    moeca_compile.reset(compiled)
    alone = generate(compiled, second)
    assert [kind for _, kind in after] == [kind for _, kind in alone]
    assert {kind for _, kind in after} != {"refresh"}, "nothing old could have been read"
    for (output, _), (expected, _) in zip(after, alone):
        torch.testing.assert_close(output, expected, rtol=0, atol=0)


@pytest.mark.parametrize("policy", EVERY)
def test_a_broken_generation_leaves_no_nan(graph_level: None, policy: str) -> None:
    model = make("I1", depth=1)
    calls = fine_steps(model, 6)
    compiled = compile_model(model, calls[0], **options_of(policy))
    for x, t, y in calls:
        with torch.no_grad(), moeca_compile.generation(compiled):
            compiled(torch.full_like(x, math.nan), t, y)
    with moeca_compile.generation(compiled):
        assert all(output.isfinite().all() for output, _ in generate(compiled, calls))


@pytest.mark.parametrize("policy", EVERY)
def test_changed_weights_are_never_answered_from_the_cache(graph_level: None, policy: str) -> None:
    model = make("I1", depth=1)
    calls = fine_steps(model, 5)
    compiled = compile_model(model, calls[0], **options_of(policy))
    generate(compiled, calls[:4])
    with torch.no_grad():
        model.head.weight.mul_(1.5)
    output, kind = kind_of(compiled, *calls[4])
    assert kind == "refresh"
    torch.testing.assert_close(output, model(*calls[4]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", EVERY)
def test_bytes_are_known_and_no_row_is_too_old(graph_level: None, policy: str) -> None:
    model = make("I1", depth=1)
    calls = fine_steps(model, 12)
    compiled = compile_model(model, calls[0], **options_of(policy))
    planned = moeca_compile.explain(compiled, *calls[0]).cache_bytes
    found = [kind for _, kind in generate(compiled, calls)]
    assert moeca_compile.stats(compiled).cache_bytes == planned > 0
    refreshes = [i for i, kind in enumerate(found) if kind == "refresh"]
    assert max(b - a for a, b in zip(refreshes, [*refreshes[1:], len(found)])) <= 3
    assert len(refreshes) < len(found)


def counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)


@pytest.mark.parametrize(
    ("policy", "between"), [("fora", "forecast"), ("output_forecast", "skip"), ("auto", "forecast")]
)
def test_flops_are_those_of_what_ran(graph_level: None, policy: str, between: str) -> None:
    """Eager counts a full step; the graph that ran between refreshes is counted as it runs.

    The samples of this trajectory move at random, and the output is no flow's: "auto" forecasts
    layers.
    """
    model = make("I1", depth=2)
    calls = fine_steps(model, 8)
    compiled = compile_model(model, calls[0], **options_of(policy))
    generate(compiled, calls)
    compiled_variants = only_entry(compiled).variants._compiled
    inner, counted = compiled_variants[between], []

    def counting(*args: Any) -> Any:
        with counter() as found:
            outputs = inner(*args)
        counted.append(found.get_total_flops())
        return outputs

    compiled_variants[between] = counting
    moeca_compile.reset(compiled)
    kinds = [kind for _, kind in generate(compiled, calls)]
    with counter() as eager, torch.no_grad():
        model(*calls[0])
    whole, stats = eager.get_total_flops(), moeca_compile.stats(compiled)
    assert len(counted) == kinds.count(between) > 0
    assert stats.flops_full == pytest.approx(len(calls) * whole, rel=1e-3)
    ran = kinds.count("refresh") * whole + sum(counted)
    assert stats.flops_computed == pytest.approx(ran, rel=1e-3)


def test_an_output_that_cannot_be_forecast_is_said(
    graph_level: None, caplog: pytest.LogCaptureFixture
) -> None:
    class WithIds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make("I1", depth=1)

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.model(x, t, y), y + 1

    model = WithIds().eval()
    call = trajectory(model.model, 1)[0]
    compiled = compile_model(model, call, **options_of("output_forecast"))
    with torch.no_grad():
        compiled(*call)
    assert "cannot be forecast: output 1 is torch.int64" in caplog.text
    assert moeca_compile.stats(compiled).plain_steps == 1
    assert only_entry(compiled).cache_bytes == 0


@pytest.mark.compile
def test_compiled_histories_keep_their_order() -> None:
    """Kernels write mutated inputs back one by one: the older value must not become the newest."""
    model = make("I8", depth=1, num_experts=4)
    calls = trajectory(model, 8, dx=0.05)
    compiled = compile_model(model, calls[0], **options_of("taylorseer", forecast_order=2))
    reference, seen = ForecastReference(model, 2), []
    for call in calls:
        output, kind = kind_of(compiled, *call)
        expected = reference.step(*call, refresh=kind == "refresh")
        torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
        seen.append(kind)
    assert seen.count("refresh") == 3
