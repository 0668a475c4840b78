"""The divergence finder: equal runs do not part; a planted mistake is found with its rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from idioms import make, trajectory
from idioms.denoiser import Denoiser
from moeca_compile.debug.divergence import Comparison, Deviation, GuardTotals, StepDeviation
from moeca_compile.debug.guard_calls import GuardCall
from moeca_compile.debug.row_details import RowWatch
from moeca_compile.debug.side_by_side import compare, relative_difference
from moeca_compile.options import Options

ALL = Options(policy="moeca", interval=3, budget=1.0, order="attention_first")


def run(model: Denoiser, options: Options, bound: float, steps: int = 3) -> Comparison:
    calls = trajectory(model, steps, dx=0.05)

    def generate(compiled: Any) -> None:
        for call in calls:
            outputs.append((compiled(*call), model(*call)))

    outputs: list[tuple[Tensor, Tensor]] = []
    found = compare(model, (calls[0], {}), generate, options, bound=bound)
    for full, eager in outputs:
        torch.testing.assert_close(full, eager, rtol=1e-4, atol=1e-5)
    return found


def test_a_threshold_that_never_fires_is_found_with_its_rows() -> None:
    model = make("I1", depth=1, num_experts=4)
    found = run(model, Options(policy="moeca", interval=3, tau=8.0, alpha=0.0), bound=0.05)
    assert [s.kind for s in found.steps] == ["refresh", "reuse", "reuse"]
    assert found.steps[0].worst.size < 1e-5, "a refresh computes everything"
    assert found.first is not None and found.worst is not None
    step, deviation = found.first
    assert step.number == 1
    assert deviation.layer.startswith("blocks.0.moe")
    assert len(deviation.rows) == 5
    assert deviation.rows[0].difference >= deviation.rows[-1].difference > 0
    branches = [b for row in deviation.rows for b in row.branches]
    assert {b.threshold for b in branches} == {8.0}
    assert all(b.score <= 1 and b.age == 1 for b in branches if b.fate == "read")
    assert found.worst[0].number == 2, "the older the rows, the further off"
    assert {b.age for row in found.worst[1].rows for b in row.branches} <= {0, 1, 2}
    (finding,) = found.findings
    assert "lowest threshold is 8.00, scores end at 1; option tau is 8" in finding
    assert "0 of " in finding
    assert "first above 0.05: step 1" in str(found) and "tau is 8" in str(found)
    data = found.to_dict()
    assert data["first"]["layer"] == deviation.layer and data["steps"][2]["kind"] == "reuse"


def test_computing_everything_does_not_part() -> None:
    model = make("I8", depth=1, num_experts=4)
    found = run(model, ALL, bound=1e-4)
    assert [s.kind for s in found.steps] == ["refresh", "reuse", "reuse"]
    assert found.first is None
    assert "no layer is off by more than 0.0001" in str(found)


def test_a_model_without_experts_compares_nothing() -> None:
    model, x = nn.Linear(4, 4).eval(), torch.randn(2, 4)
    found = compare(model, ((x,), {}), lambda m: m(x), Options(), bound=0.1)
    assert found.steps == () and found.first is None and found.worst is None
    assert "no mixture-of-experts layer" in str(found)
    assert "nothing was compared" in str(found)


def comparison(options: Options, totals: GuardTotals) -> Comparison:
    deviation = Deviation("blocks.0.moe", "experts", 0.2)
    step = StepDeviation(1, "reuse", "policy", 0.5, (deviation,), totals)
    return Comparison(0.1, options, (step,))


@pytest.mark.parametrize(
    ("options", "totals", "words"),
    [
        (Options(tau=8.0), GuardTotals(50, 0, 0, 3.2, 1.0), "tau is 8, lower it"),
        (Options(tau=0.0), GuardTotals(50, 50, 0, 0.0, 1.0), "every score is above"),
        (Options(budget=0.1), GuardTotals(50, 5, 3, 9.0, 1.0), "raise budget"),
        (Options(policy="moeca"), GuardTotals(50, 5, 0, 0.4, 1.0), "5 of 50 cached branches"),
    ],
)
def test_findings_say_what_stands_out(options: Options, totals: GuardTotals, words: str) -> None:
    assert words in "; ".join(comparison(options, totals).findings)


def test_a_difference_is_relative_and_nan_is_infinite() -> None:
    full = torch.tensor([3.0, 4.0])
    assert relative_difference(full, full + torch.tensor([0.0, 0.5])) == pytest.approx(0.1)
    assert relative_difference(full, full * float("nan")) == float("inf")


def test_ages_count_from_the_step_that_computed_a_branch() -> None:
    class Region:
        top_k = 2

    class Layer:
        tokens, region = 2, Region

    watch = RowWatch([Layer])  # type: ignore[list-item]
    some = torch.tensor([[True, False], [False, False]])
    other = torch.zeros(2, 2)
    guard = GuardCall(other.long(), other, other, other, ~some, some)
    watch.ran(0, "refresh", [])
    watch.ran(0, "reuse", [guard])
    watch.ran(0, "reuse", [guard])
    assert watch._ages[0][0].tolist() == [[0, 2], [2, 2]]
    watch.ran(0, "refresh", [])
    assert watch._ages[0][0].sum() == 0
