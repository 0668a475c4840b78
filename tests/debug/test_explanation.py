"""explain as JSON and Markdown; predicted arithmetic; graph breaks with their cause."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import moeca_compile
from graph_runs import compile_model, use_graph_level, watched_call
from idioms import inputs, make, trajectory
from moeca_compile.debug.explain import Analyser, explain_with
from moeca_compile.debug.explanation import ExplainedRegion, Explanation
from moeca_compile.options import Options


def refused() -> Explanation:
    region = ExplainedRegion(
        "moe", "blocks.0.moe", False, "rows | mixed", location="model.py:3", stage="match_regions",
        node="sum_1",
    )  # fmt: skip
    return Explanation((region,), 1, 0, None, ("a note",), ("item() at model.py:9",))


def test_every_form_says_the_same() -> None:
    report = refused()
    data = json.loads(json.dumps(report.to_dict()))
    assert data["regions"][0]["reason"] == "rows | mixed"
    assert data["regions"][0]["where"] == "model.py:3"
    assert data["break_reasons"] == ["item() at model.py:9"]
    assert not report.matched
    for text in (str(report), report.to_markdown()):
        assert "match_regions" in text and "item() at model.py:9" in text and "a note" in text
    row = report.to_markdown().splitlines()[2]
    assert "rows \\| mixed" in row, "a bar would end the cell"


class Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2


def test_a_graph_break_names_its_line() -> None:
    report = moeca_compile.explain(Breaks(), torch.randn(2))
    assert report.graph_breaks == 1
    assert len(report.break_reasons) == 1
    assert "test_explanation.py:" in report.break_reasons[0]


@pytest.mark.parametrize(
    "order", [pytest.param("router_first", marks=pytest.mark.slow), "attention_first"]
)
def test_what_runs_lies_within_the_prediction(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    use_graph_level(monkeypatch)
    model = make("I8", depth=1, num_experts=4)
    options = Options(policy="moeca", interval=4, budget=0.25, order=order)
    analyser = Analyser(options)
    predicted = explain_with(analyser, model, inputs(model), {}).prediction
    assert predicted is not None
    calls = trajectory(model, 4, dx=0.05)
    compiled = compile_model(model, calls[0], **options.to_dict())
    for call in calls:
        watched_call(compiled, *call)
    ran = moeca_compile.stats(compiled)
    assert (ran.refresh_steps, ran.reuse_steps) == (1, 3)
    assert predicted.flops_full == pytest.approx(ran.flops_full / 4)
    assert predicted.speedup_min - 1e-9 <= ran.speedup_flops <= predicted.speedup_max + 1e-9
    if order == "attention_first":  # nothing depends on the data
        assert predicted.speedup_min == pytest.approx(ran.speedup_flops)
