"""Attention as blocks of real models use it: what is found, exact, and rows kept where they belong.

No float64 reference follows these forms. Two checks take its place: with a budget of 1 the
attention-first order computes everything, so it is eager; and a reuse step on the arguments of the
refresh must give the eager output again, whatever was selected, or a row came from a wrong place.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moeca_compile
import moeca_compile.lowering.variants as variants_module
from contracts.generations import assert_reused, difference, run
from graph_runs import compile_model
from idioms import inputs, trajectory
from idioms.forms import FORMS, TEXT, FormDenoiser, make_form

TOKENS = 16
EVERY = [pytest.param(f, marks=() if f == "joint" else pytest.mark.slow) for f in FORMS]
# form -> attention regions of a layer, and K and V that are kept in each
KEPT = {
    "joint": [2],
    "text first": [2],
    "one projection": [0],
    "text keys": [2],
    "cross": [2, 0],
    "masked": [2],
    "time token": [2],
}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Lowered graphs, in the order they were made, run as they are."""
    made: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, *_: Any) -> torch.fx.GraphModule:
        made.append(gm)
        return gm

    monkeypatch.setattr(variants_module, "inductor", keep)
    return made


def model_and_calls(form: str) -> tuple[FormDenoiser, list]:
    model = make_form(form)
    return model, trajectory(model, 4, dx=0.1)


@pytest.mark.parametrize("form", EVERY)
def test_layers_and_their_attention_are_found(form: str) -> None:
    model = make_form(form)
    compiled = torch.compile(model, backend="moeca", options={"policy": "moeca"})
    report = moeca_compile.explain(compiled, *inputs(model))
    assert [r.reason for r in report.regions if not r.matched] == []
    kinds = [r.kind for r in report.regions]
    assert kinds == ["moe", *["attention"] * len(KEPT[form])]
    details = [r.detail for r in report.regions if r.kind == "attention"]
    assert [d == "K and V cached" for d in details] == [kept == 2 for kept in KEPT[form]]


@pytest.mark.parametrize("form", EVERY)
def test_with_everything_computed_it_is_eager(
    graphs: list[torch.fx.GraphModule], form: str
) -> None:
    model, calls = model_and_calls(form)
    compiled = compile_model(model, calls[0], interval=4, budget=1.0, order="attention_first")
    kinds = []
    for call in calls:
        ran = run(compiled, *call)
        kinds.append(ran.kind)
        assert difference(ran.output, model, *call) <= 1e-5
    assert kinds == ["refresh", "reuse", "reuse", "reuse"]


@pytest.mark.parametrize("form", EVERY)
def test_rows_are_read_where_they_were_written(
    graphs: list[torch.fx.GraphModule], form: str
) -> None:
    model, calls = model_and_calls(form)
    compiled = compile_model(model, calls[0], interval=9)
    with moeca_compile.generation(compiled):
        run(compiled, *calls[0])
        graphs.clear()
        again = run(compiled, *calls[0])
        assert again.kind == "reuse"
        assert difference(again.output, model, *calls[0]) <= 1e-5
        check_queries(graphs)
        for call in calls[1:]:  # rows are written one by one from here on
            assert_reused(run(compiled, *call), model, *call)
    stats = moeca_compile.stats(compiled)
    assert 0 < stats.tokens_attended < stats.tokens_total
    with moeca_compile.generation(compiled):
        assert difference(run(compiled, *calls[3]).output, model, *calls[3]) <= 1e-5


def check_queries(graphs: list[torch.fx.GraphModule]) -> None:
    """No attention of a reuse step has all queries of a stream that is selected from."""
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    attention = (sdpa, torch.ops.moeca.few_queries_attention.default)
    (reuse,) = graphs
    cores = [n for n in reuse.graph.nodes if n.target in attention]
    rows = [n.args[0].meta["val"].shape[-2] for n in cores]
    assert not {TOKENS, TOKENS + TEXT, TOKENS + 2} & {r for r in rows if isinstance(r, int)}
    assert any(not isinstance(r, int) for r in rows)
    assert all(r == TEXT for r in rows if isinstance(r, int))
