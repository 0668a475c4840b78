"""Expert choice is recognised and computed as written; token choice is not taken for it."""

from __future__ import annotations

import pytest
import torch

import moeca_compile
from aten_graphs import traced
from idioms import EXPERT_CHOICE, inputs, make
from moeca_compile.passes.constant_cumsum import ConstantCumsum
from moeca_compile.passes.find_expert_choice import FindExpertChoice
from moeca_compile.passes.verify import verify

aten = torch.ops.aten


@pytest.mark.parametrize("idiom", EXPERT_CHOICE)
def test_explain_names_expert_choice(idiom: str) -> None:
    model = make(idiom, depth=1, expert="swiglu")
    call = inputs(model)
    if idiom == "I6_grouped":
        model, call = model.bfloat16(), (call[0].bfloat16(), call[1].bfloat16(), call[2])
    report = moeca_compile.explain(model, *call)
    found = [r for r in report.regions if r.stage == "find_expert_choice"]
    assert [(r.name, r.matched) for r in found] == [("blocks.0.moe", False)]
    assert "computed as written" in found[0].reason
    pooled = "tokens of all 2 samples" in found[0].reason
    assert pooled is (idiom == "I7")
    assert "dispatch/" in found[0].where
    assert report.graph_breaks == 0 and not report.matched


@pytest.mark.parametrize("idiom", ["I8", "I9"])
@pytest.mark.parametrize("tokens", [16, 4])
def test_token_choice_is_no_expert_choice(idiom: str, tokens: int) -> None:
    """4 tokens, 2 samples and 8 experts: the sizes alone do not tell them apart."""
    model = make(idiom, depth=1, tokens=tokens)
    call = inputs(model)
    if idiom == "I9":
        model, call = model.bfloat16(), (call[0].bfloat16(), call[1].bfloat16(), call[2])
    assert FindExpertChoice().run(traced(model, *call).gm).missed == ()


def test_offsets_of_equal_groups_stay_int32() -> None:
    model = make("I6_grouped", depth=1, expert="swiglu").bfloat16()
    x, t, y = inputs(model)
    graph = traced(model, x.bfloat16(), t.bfloat16(), y)
    expected = graph.run()
    report = ConstantCumsum().run(graph.gm)
    verify(graph.gm, report.name)
    assert report.changed == 1
    (cumsum,) = graph.gm.graph.find_nodes(op="call_function", target=aten.cumsum.default)
    assert cumsum.meta["val"].dtype == torch.int64 and not cumsum.kwargs
    assert torch.equal(graph.run(), expected)
    assert ConstantCumsum().run(graph.gm).changed == 0


def test_cumulative_sums_of_data_are_left_alone() -> None:
    graph = traced(lambda ids: torch.cumsum(ids, 0, dtype=torch.int32) * 2, torch.arange(6))
    assert ConstantCumsum().run(graph.gm).changed == 0


@pytest.mark.compile
@pytest.mark.slow
def test_equal_groups_compile_with_inductor() -> None:
    model = make("I6_grouped", depth=1, expert="swiglu").bfloat16()
    x, t, y = inputs(model)
    call = (x.bfloat16(), t.bfloat16(), y)
    with torch.no_grad():
        found, expected = torch.compile(model, backend="moeca")(*call), model(*call)
    assert (found - expected).norm() / expected.norm() < 0.1
