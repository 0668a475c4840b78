"""Regions of every idiom that can be traced as it is, and of combines in several spellings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moeca_compile.graph.attention as attention_module
import moeca_compile.graph.streams as streams_module
from aten_graphs import TracedGraph, traced
from idioms import ATTENTIONS, EXPERTS, ROUTERS, inputs, make
from idioms.dispatch.split import SplitMoE
from moeca_compile.graph.dry_run import DryRun, dry_pull
from moeca_compile.graph.region import Regions
from moeca_compile.passes.match_regions import match_regions
from moeca_compile.passes.normalize_attention import NormalizeAttention
from moeca_compile.passes.normalize_experts import NormalizeExperts
from moeca_compile.passes.normalize_gathered import NormalizeGathered
from moeca_compile.passes.normalize_grouped import NormalizeGrouped
from quick import in_pairs

TOKENS = 16
# einsum is in every run in test_normalize_attention.py
ATTENTION_CASES = [
    pytest.param(name, marks=[pytest.mark.slow] * (name == "einsum")) for name in sorted(ATTENTIONS)
]


def matched(graph: TracedGraph) -> Regions:
    passes = (NormalizeExperts(), NormalizeGathered(), NormalizeGrouped(), NormalizeAttention())
    for each in passes:
        assert each.run(graph.gm).missed == ()
    return match_regions(graph.gm)


def check_whole_model(regions: Regions, *, batch: int, top_k: int, shared: int) -> None:
    """Two layers, each with its attention, cached K and V, and one root for the shared experts."""
    assert regions.missed == ()
    assert len(regions.moe) == len(regions.attention) == 2
    for region, attention in zip(regions.moe, regions.attention, strict=True):
        assert (region.space.samples, region.space.tokens) == (batch, TOKENS)
        assert (region.num_experts, region.top_k) == (8, top_k)
        assert region.attention == (attention,)
        assert len(attention.key_value) == 2
        assert len(region.shared) == min(shared, 1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("attention", ATTENTION_CASES)
@pytest.mark.parametrize("idiom", ["I8", "I9"])
def test_stacked_idioms(idiom: str, attention: str, shared: int, batch: int) -> None:
    model = make(idiom, attention=attention, shared=shared)
    x, t, y = inputs(model, batch)
    if idiom == "I9":  # grouped products have fake values in bfloat16 only
        model, x = model.bfloat16(), x.bfloat16()
    check_whole_model(matched(traced(model, x, t, y)), batch=batch, top_k=2, shared=shared)


def traced_form(self: SplitMoE, x: Tensor) -> Tensor:
    """The dispatch as capture leaves it: every expert on marked rows, then a selection."""
    rows = x.reshape(-1, x.shape[-1])
    weights, ids = self.router(rows)
    mark, select = torch.ops.moeca.expert_rows, torch.ops.moeca.select_experts
    out = select(ids, [run(mark(rows, e)) for e, run in enumerate(self.experts)])
    y = (out * weights.unsqueeze(-1).to(out.dtype)).sum(1)
    if self.shared is not None:
        y = y + self.shared(rows)
    return y.view(x.shape)


@pytest.mark.parametrize(
    ("router", "expert", "attention"),
    in_pairs(sorted(ROUTERS), sorted(EXPERTS), sorted(ATTENTIONS)),
)
def test_traced_form(
    router: str, expert: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SplitMoE, "forward", traced_form)
    model = make("split", router=router, expert=expert, attention=attention)
    graph = traced(model, *inputs(model))
    expected = graph.run()
    check_whole_model(matched(graph), batch=2, top_k=2, shared=1)
    torch.testing.assert_close(graph.run(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 4])
def test_traced_form_of_other_k(top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SplitMoE, "forward", traced_form)
    model = make("split", top_k=top_k)
    regions = matched(traced(model, *inputs(model)))
    check_whole_model(regions, batch=2, top_k=top_k, shared=1)


Combine = Callable[[Tensor, Tensor], Tensor]
COMBINES: dict[str, Combine] = {
    "product and sum": lambda y, w: (y * w.unsqueeze(-1)).sum(1),
    "sum over a negative dim": lambda y, w: (w[..., None] * y).sum(-2),
    "einsum": lambda y, w: torch.einsum("tkd,tk->td", y, w),
    "einsum and sum": lambda y, w: torch.einsum("tkd,tk->tkd", y, w).sum(1),
    "einsum, weights first": lambda y, w: torch.einsum("tk,tkd->td", w, y),
    "bmm": lambda y, w: torch.bmm(w.unsqueeze(1), y).squeeze(1),
    "matmul": lambda y, w: (y.transpose(1, 2) @ w.unsqueeze(-1)).squeeze(-1),
    "flat": lambda y, w: (y.flatten(0, 1) * w.reshape(-1, 1)).view(y.shape).sum(1),
    "cast": lambda y, w: (y.double() * w.double()[..., None]).sum(1).float(),
}


def layer_graph(combine: Combine, between: Combine | None = None) -> TracedGraph:
    """Attention, then a layer of three experts whose outputs [T, K, D] go through `combine`."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(8, 8, generator=generator) / 3 for _ in range(6)]
    router = torch.randn(3, 8, generator=generator)
    x = torch.randn(2, 5, 8, generator=generator)

    def run(x: Tensor, router: Tensor, weights: list[Tensor]) -> Tensor:
        query, key, value = (F.linear(x, w).unsqueeze(1) for w in weights[:3])
        x = x + F.scaled_dot_product_attention(query, key, value).squeeze(1)
        x = x if between is None else between(x, weights[0])
        rows = x.view(-1, 8)
        w, ids = F.linear(rows, router).softmax(-1).topk(2, dim=-1)
        mark, select = torch.ops.moeca.expert_rows, torch.ops.moeca.select_experts
        out = select(ids, [F.linear(mark(rows, e), weights[3 + e]) for e in range(3)])
        return combine(out, w)

    return traced(run, x, router, weights)


@pytest.mark.parametrize("spelling", COMBINES)
def test_spelling_of_combine(spelling: str) -> None:
    regions = matched(layer_graph(COMBINES[spelling]))
    assert regions.missed == ()
    (region,) = regions.moe
    assert list(region.weights.meta["val"].shape) == [10, 2]
    assert len(region.attention) == 1


NO_COMBINES: dict[str, tuple[Combine, str]] = {
    "not weighted": (lambda y, w: y.sum(1), "times router weights"),
    "weighted twice": (lambda y, w: (y * w[..., None]).sum(1) + y[:, 0], "in several places"),
    "largest slot": (lambda y, w: (y * w[..., None]).amax(1), "not summed over the slots"),
    "slots in a row": (lambda y, w: (y * w[..., None]).flatten(1), "not summed over the slots"),
    "sum over tokens": (lambda y, w: (y * w[..., None]).sum(0), "not summed over the slots"),
    "einsum over tokens": (
        lambda y, w: torch.einsum("tkd,tk->kd", y, w),
        "not summed over the slots",
    ),
    "einsum without a sum": (
        lambda y, w: torch.einsum("tkd,tk->tkd", y, w).flatten(1),
        "not summed over the slots",
    ),
    "weights of slots": (lambda y, w: (y * w.mean(0)[:, None]).sum(1), "router weights of shape"),
}


@pytest.mark.parametrize("case", NO_COMBINES)
def test_other_use_of_branches_is_no_region(case: str) -> None:
    combine, reason = NO_COMBINES[case]
    regions = matched(layer_graph(combine))
    assert regions.moe == ()
    assert [m.kind for m in regions.missed] == ["moe"]
    assert reason in regions.missed[0].reason


def test_attention_before_another_linear_is_not_paired() -> None:
    regions = matched(layer_graph(COMBINES["einsum"], lambda x, w: x + F.linear(x, w)))
    assert [r.attention for r in regions.moe] == [()]
    (miss,) = regions.missed
    assert miss.kind == "attention"
    assert "lies between this attention and the next routing" in miss.reason


def rows_pulled(monkeypatch: pytest.MonkeyPatch, depth: int) -> int:
    """Nodes that the search for attention evaluates on rows, in a residual stream of blocks."""
    weights = [torch.eye(8) for _ in range(3)]
    pulled: list[int] = []

    def run(x: Tensor, weights: list[Tensor]) -> Tensor:
        for _ in range(depth):
            rows = F.layer_norm(x, (8,))
            query, key, value = (F.linear(rows, w).unsqueeze(1) for w in weights)
            x = x + F.scaled_dot_product_attention(query, key, value).squeeze(1)
        return x

    def counted(*args: Any) -> DryRun | None:
        dry = dry_pull(*args)
        pulled.append(len(dry.pulled) if dry is not None else 0)
        return dry

    graph = traced(run, torch.randn(2, 5, 8), weights)
    with monkeypatch.context() as patched:
        patched.setattr(attention_module, "dry_pull", counted)
        patched.setattr(streams_module, "dry_pull", counted)
        assert all(r.key_value for r in attention_module.find_attention(graph.gm, []))
    return sum(pulled)


def test_the_search_for_attention_grows_with_the_depth_not_its_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two, four, six = (rows_pulled(monkeypatch, depth) for depth in (2, 4, 6))
    assert six - four == four - two > 0
