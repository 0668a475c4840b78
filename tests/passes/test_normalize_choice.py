"""Experts that pick their tokens become one node; what does not is reported and left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moeca_compile
from aten_graphs import TracedGraph, traced
from idioms import EXPERT_CHOICE, inputs, make
from moeca_compile.graph.chosen import Groups, chosen_experts
from moeca_compile.graph.region import ChoiceRegion
from moeca_compile.passes.constant_cumsum import ConstantCumsum
from moeca_compile.passes.match_regions import match_regions
from moeca_compile.passes.normalize_choice import NormalizeChoice
from moeca_compile.passes.normalize_pool import NormalizePool
from moeca_compile.passes.verify import verify

aten = torch.ops.aten


def graph_of(idiom: str, **sizes: int) -> TracedGraph:
    model = make(idiom, depth=1, expert="swiglu", num_experts=4, **sizes)
    call = inputs(model)
    if idiom == "I6_grouped":
        model, call = model.bfloat16(), (call[0].bfloat16(), call[1].bfloat16(), call[2])
    return traced(model, *call)


def normalized(graph: TracedGraph) -> list[str]:
    """Reasons of near misses; passes change the graph once."""
    missed = []
    for each in (NormalizePool(), NormalizeChoice()):
        report = each.run(graph.gm)
        verify(graph.gm, report.name)
        missed += [m.reason for m in report.missed]
        assert each.run(graph.gm).changed == 0
    return missed


@pytest.mark.parametrize(
    "idiom",
    [pytest.param(i, marks=[pytest.mark.slow] * (i in ("I6", "I7"))) for i in EXPERT_CHOICE],
)
def test_experts_become_one_node(idiom: str) -> None:
    graph = graph_of(idiom)
    expected = graph.run()
    assert normalized(graph) == []
    found = graph.run()
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert graph.targets[chosen_experts] == 1
    left = {aten.item.default, aten._assert_scalar.default, aten._grouped_mm.default}
    assert not left & graph.targets.keys()
    (region,) = match_regions(graph.gm).moe
    assert isinstance(region, ChoiceRegion)
    pooled = idiom == "I7"
    assert (region.groups, region.branches) == ((1, 32 * 4) if pooled else (2, 2 * 4 * 8))
    assert region.open_ended is pooled
    assert len(region.shared) == 1 and len(region.attention) == 1


@pytest.mark.slow
@pytest.mark.parametrize("idiom", EXPERT_CHOICE)
def test_explain_shows_who_picks_how_many(idiom: str) -> None:
    model = make(idiom, depth=1, expert="swiglu")
    call = inputs(model)
    if idiom == "I6_grouped":
        model, call = model.bfloat16(), (call[0].bfloat16(), call[1].bfloat16(), call[2])
    report = moeca_compile.explain(model, *call)
    (layer,) = [r for r in report.regions if r.kind == "moe"]
    counts = "up to 32 of 32 tokens of the whole batch" if idiom == "I7" else "4 of 16 tokens"
    assert layer.matched and f"8 experts picking {counts}" in layer.detail
    assert report.graph_breaks == 0 and report.matched


@pytest.mark.parametrize("idiom", ["I8", "I9"])
@pytest.mark.parametrize("tokens", [16, 4])
def test_token_choice_is_no_expert_choice(idiom: str, tokens: int) -> None:
    """4 tokens, 2 samples and 8 experts: the sizes alone do not tell them apart."""
    model = make(idiom, depth=1, tokens=tokens)
    call = inputs(model)
    if idiom == "I9":
        model, call = model.bfloat16(), (call[0].bfloat16(), call[1].bfloat16(), call[2])
    graph = traced(model, *call)
    assert normalized(graph) == [] and not graph.targets[chosen_experts]


class Layer(nn.Module):
    """Two experts that each pick 3 of 8 tokens of each sample; `forward` ends in `after(self, ..)`.

    pick(flat [T, D], rows [R]) -> [R, D]; experts(self, picked) -> [R, D].
    """

    def __init__(self, after: Callable, experts: Callable | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        make = lambda *shape: nn.Parameter(torch.randn(*shape, generator=generator))  # noqa: E731
        self.router, self.w = make(2, 4), nn.ParameterList([make(4, 4), make(4, 4)])
        self.after, self.experts = after, experts or apply_each

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        x = x * 1.5
        gates, picks = F.linear(x, self.router).softmax(-1).transpose(1, 2).topk(3, dim=-1)
        first = torch.arange(b).view(b, 1, 1) * n
        rows = (first + picks).transpose(0, 1).reshape(-1)
        gates = gates.transpose(0, 1).reshape(-1, 1)
        flat = x.reshape(b * n, d)
        out = self.experts(self, flat[rows])
        return self.after(flat, rows, gates, out)


def sample() -> Tensor:
    return torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(1))


def apply_each(layer: Layer, picked: Tensor) -> Tensor:
    return torch.cat([F.silu(F.linear(p, w)) for p, w in zip(picked.chunk(2), layer.w)])


def add_rows(flat: Tensor, rows: Tensor, gates: Tensor, out: Tensor) -> Tensor:
    return torch.zeros_like(flat).index_add(0, rows, out * gates)


def one_expert_differs(layer: Layer, picked: Tensor) -> Tensor:
    first, second = picked.chunk(2)
    return torch.cat([F.silu(F.linear(first, layer.w[0])), F.gelu(F.linear(second, layer.w[1]))])


def uneven(layer: Layer, picked: Tensor) -> Tensor:
    parts = picked.split([4, 8])
    return torch.cat([F.linear(p, w) for p, w in zip(parts, layer.w)])


def mixing(layer: Layer, picked: Tensor) -> Tensor:
    return torch.cat([F.linear(p - p.mean(0), w) for p, w in zip(picked.chunk(2), layer.w)])


def without_gates(flat: Tensor, rows: Tensor, gates: Tensor, out: Tensor) -> Tensor:
    return torch.zeros_like(flat).index_add(0, rows, out) + gates.sum()


def squared(flat: Tensor, rows: Tensor, gates: Tensor, out: Tensor) -> Tensor:
    return torch.zeros_like(flat).index_add(0, rows, (out * gates).exp())


def used_twice(flat: Tensor, rows: Tensor, gates: Tensor, out: Tensor) -> Tensor:
    return torch.zeros_like(flat).index_add(0, rows, out * gates) + out.mean()


def highest(flat: Tensor, rows: Tensor, gates: Tensor, out: Tensor) -> Tensor:
    index = rows.unsqueeze(1).expand_as(out)
    return torch.zeros_like(flat).scatter_reduce(0, index, out * gates, "amax")


def test_a_small_layer_matches() -> None:
    graph = traced(Layer(add_rows), sample())
    expected = graph.run()
    assert normalized(graph) == []
    # not bitwise: products over other numbers of rows round differently
    torch.testing.assert_close(graph.run(), expected, rtol=1e-5, atol=1e-6)
    assert graph.targets[chosen_experts] == 1
    (node,) = graph.gm.graph.find_nodes(op="call_function", target=chosen_experts)
    assert Groups(*node.args[4]) == Groups(2, 3)  # type: ignore[misc]
    assert len(match_regions(graph.gm).moe) == 1


@pytest.mark.parametrize(
    ("experts", "reason"),
    [
        (one_expert_differs, "experts differ"),
        (uneven, "experts with different numbers of tokens"),
        (mixing, "an expert needs all of its rows at once"),
    ],
)
def test_experts_that_are_no_list_of_branches(experts: Callable, reason: str) -> None:
    graph = traced(Layer(add_rows, experts), sample())
    before = graph.text()
    (told,) = normalized(graph)
    assert "each expert picks 3 of 8 tokens" in told and reason in told
    assert graph.text() == before


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (without_gates, "no gates"),
        (squared, "expected a sum"),
        (used_twice, "used in several places"),
        (highest, "expected a sum"),
    ],
)
def test_combines_that_are_no_weighted_sum(after: Callable, reason: str) -> None:
    graph = traced(Layer(after), sample())
    expected = graph.run()
    assert normalized(graph) == []
    regions = match_regions(graph.gm)
    (miss,) = [m for m in regions.missed if m.kind == "moe"]
    assert reason in miss.reason and not regions.moe
    torch.testing.assert_close(graph.run(), expected, rtol=1e-4, atol=1e-5)


def test_offsets_of_equal_groups_stay_int32() -> None:
    graph = graph_of("I6_grouped")
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
