"""Attention written with einsum: the products it is rewritten into, and what is left as written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aten_graphs import TracedGraph, traced
from moeca_compile.passes.match_regions import match_regions
from moeca_compile.passes.normalize_attention import NormalizeAttention
from moeca_compile.passes.normalize_experts import NormalizeExperts
from moeca_compile.passes.verify import verify

aten = torch.ops.aten
HEADS, HEAD, EXPERTS = 2, 3, 3
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, N, D] -> [B, N, D]
einsum = torch.einsum


def split(*values: Tensor) -> list[Tensor]:
    """[B, N, D] -> [B, N, H, d]."""
    return [v.unflatten(-1, (HEADS, HEAD)) for v in values]


def heads_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in split(q, k, v))
    weights = einsum("bhqd,bhkd->bhqk", q * HEAD**-0.5, k).softmax(-1)
    return einsum("bhqk,bhkd->bhqd", weights, v).transpose(1, 2).flatten(2)


def tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = split(q, k, v)
    weights = F.softmax(einsum("bqhd,bkhd->bhqk", q, k) / 3, dim=3).to(v.dtype)
    return einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


def one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return einsum("b i j, b j d -> b i d", einsum("bid,bjd->bij", q, k).softmax(-1), v)


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = split(q, k, v)
    weights = einsum("bkhd,bqhd->bhqk", k, q).softmax(-1)
    return einsum("bkhd,bhqk->bqhd", v, weights).flatten(2)


def with_ellipsis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in split(q, k, v))
    weights = einsum("...qd,...kd->...qk", q, k).softmax(-1)
    return einsum("...qk,...kd->...qd", weights, v).transpose(1, 2).flatten(2)


def scores_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return einsum("bid,bjd->bij", q, k).softmax(-1) @ v


def output_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return einsum("bij,bjd->bid", (q @ k.mT).softmax(-1), v)


HITS = (
    heads_first,
    tokens_first,
    one_head,
    keys_first,
    with_ellipsis,
    scores_only,
    output_only,
)


def block_graph(attend: Attend, *, experts: bool = True) -> TracedGraph:
    """Attention, then three linear experts, as capture leaves them."""
    generator = torch.Generator().manual_seed(0)
    dim = HEADS * HEAD
    weights = [torch.randn(dim, dim, generator=generator) / 3 for _ in range(4 + EXPERTS)]
    router = torch.randn(EXPERTS, dim, generator=generator)
    x = torch.randn(2, 5, dim, generator=generator)

    def run(x: Tensor, router: Tensor, weights: list[Tensor]) -> Tensor:
        x = x + F.linear(attend(*(F.linear(x, w) for w in weights[:3])), weights[3])
        if not experts:
            return x
        rows = x.view(-1, dim)
        w, ids = F.linear(rows, router).softmax(-1).topk(2, dim=-1)
        mark, select = torch.ops.moeca.expert_rows, torch.ops.moeca.select_experts
        out = select(ids, [F.linear(mark(rows, e), weights[4 + e]) for e in range(EXPERTS)])
        return (out * w.unsqueeze(-1)).sum(1)

    graph = traced(run, x, router, weights)
    NormalizeExperts().run(graph.gm)
    return graph


@pytest.mark.parametrize("attend", HITS, ids=lambda f: f.__name__)
def test_einsums_become_products_and_keys_are_cached(attend: Attend) -> None:
    graph = block_graph(attend)
    expected = graph.run()
    report = NormalizeAttention().run(graph.gm)
    verify(graph.gm, report.name)
    assert (report.changed, report.missed) == (1, ())
    assert graph.targets[aten.einsum.default] == 0
    assert graph.targets[aten.matmul.default] == 2
    torch.testing.assert_close(graph.run(), expected, rtol=1e-5, atol=1e-6)
    (region,) = match_regions(graph.gm).attention
    assert (region.space.samples, region.space.tokens) == (2, 5)
    assert len(region.key_value) == 2
    text = graph.text()
    assert NormalizeAttention().run(graph.gm).changed == 0
    assert graph.text() == text


def test_products_are_shown_where_the_einsum_was() -> None:
    graph = block_graph(tokens_first)
    (scores,) = (n for n in graph.gm.graph.nodes if n.args[:1] == ("bqhd,bkhd->bhqk",))
    stack = scores.meta["stack_trace"]
    NormalizeAttention().run(graph.gm)
    made = [n for n in graph.gm.graph.nodes if n.meta.get("stack_trace") == stack]
    assert aten.matmul.default in {n.target for n in made}


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return einsum("bij,bjd->bid", einsum("bid,bjd->bij", q, k).softmax(1), v)


def grouped_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two dims of the scores are the queries' alone."""
    (q,) = split(q)
    k, v = (t[..., :HEAD] for t in (k, v))
    weights = einsum("bqhd,bkd->bhqk", q, k).softmax(-1)
    return einsum("bhqk,bkd->bqhd", weights, v).flatten(2)


def heads_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = split(q, k, v)
    weights = einsum("bqhd,bkhd->bqhk", q, k).softmax(-1)
    return einsum("bqhk,bkhd->bqhd", weights, v).flatten(2)


def one_sample_for_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return einsum("bij,bjd->bid", einsum("bid,bjd->bij", q, k[:1]).softmax(-1), v)


def no_arrow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return einsum("bij,bjd->bid", einsum("...id,...jd", q, k).softmax(-1), v)


NEAR_MISSES: dict[Attend, str] = {
    over_queries: "not over the last dim",
    grouped_queries: "no product of rows and columns",
    heads_between: "gives no scores",
    one_sample_for_all: "no product of two operands",
    no_arrow: "without an explicit output",
}


@pytest.mark.parametrize("attend", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_miss_stays_as_written(attend: Attend) -> None:
    graph = block_graph(attend)
    text = graph.text()
    report = NormalizeAttention().run(graph.gm)
    assert (report.changed, graph.text()) == (0, text)
    (miss,) = report.missed
    assert miss.kind == "attention"
    assert NEAR_MISSES[attend] in miss.reason


def soft_mixture(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A router's softmax between two einsums: its logits come from a parameter."""
    weights = einsum("bnd,ed->bne", q, ROUTER).softmax(-1)
    return einsum("bne,bned->bnd", weights, torch.stack([k, v, q], 2))


ROUTER = torch.randn(3, HEADS * HEAD, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("attend", "experts"), [(soft_mixture, True), (heads_first, False)])
def test_other_einsums_are_none_of_its_business(attend: Attend, experts: bool) -> None:
    graph = block_graph(attend, experts=experts)
    text = graph.text()
    report = NormalizeAttention().run(graph.gm)
    assert (report.changed, report.missed, graph.text()) == (0, (), text)
