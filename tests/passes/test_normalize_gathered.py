"""Gathered stacked weights become one routed node, whatever the spelling; near misses stay.

One file: a near miss is one change to a spelling that stands above it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aten_graphs import TracedGraph, traced
from idioms import EXPERTS, ROUTERS, inputs, make
from moeca_compile.graph.experts import num_experts_of
from moeca_compile.passes.match_regions import match_regions
from moeca_compile.passes.normalize_gathered import NormalizeGathered
from moeca_compile.passes.verify import verify
from quick import in_pairs

aten = torch.ops.aten
TOKENS, DIM, HIDDEN, EXPERT_COUNT = 12, 8, 10, 5
Layer = Callable[..., Tensor]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("router", "expert", "top_k"), in_pairs(sorted(ROUTERS), sorted(EXPERTS), [1, 2, 4])
)
def test_model_of_any_router(router: str, expert: str, top_k: int) -> None:
    model = make("I8", router=router, expert=expert, top_k=top_k)
    graph = traced(model, *inputs(model))
    expected, config = graph.run(), model.config
    gathered = 32 * top_k * config.hidden * config.dim
    assert graph.largest() >= gathered
    report = NormalizeGathered().run(graph.gm)
    verify(graph.gm, report.name)
    assert (report.changed, report.missed) == (2, ())
    assert aten.bmm.default not in graph.targets
    assert graph.largest() < gathered
    assert [num_experts_of(n.args[3]) for n in graph.routed] == [8, 8]
    assert all(n.op == "placeholder" for r in graph.routed for n in r.args[3])
    assert relative_error(graph.run(), expected) < 1e-5

    regions = match_regions(graph.gm)
    assert not regions.missed
    assert [(r.top_k, r.space.rows) for r in regions.moe] == [(top_k, 32)] * 2
    assert [(len(r.attention), len(r.shared)) for r in regions.moe] == [(1, 1)] * 2


def test_second_run_changes_nothing() -> None:
    model = make("I8")
    graph = traced(model, *inputs(model))
    NormalizeGathered().run(graph.gm)
    text = graph.text()
    again = NormalizeGathered().run(graph.gm)
    assert (again.changed, again.missed, graph.text()) == (0, (), text)


def parameters() -> dict[str, Tensor]:
    """One layer's stacked parameters, weights as [E, out, in]."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "w1": (EXPERT_COUNT, HIDDEN, DIM),
        "b1": (EXPERT_COUNT, HIDDEN),
        "w2": (EXPERT_COUNT, DIM, HIDDEN),
        "b2": (EXPERT_COUNT, DIM),
        "gate": (EXPERT_COUNT, 2 * HIDDEN, DIM),
    }
    return {n: torch.randn(*s, generator=generator) / 3 for n, s in shapes.items()}


def layer_inputs(top_k: int) -> tuple[Tensor, Tensor]:
    """Rows [T, D] and router logits [T, E]."""
    generator = torch.Generator().manual_seed(top_k)
    x = torch.randn(TOKENS, DIM, generator=generator)
    return x, torch.randn(TOKENS, EXPERT_COUNT, generator=generator)


def layer_graph(layer: Layer, top_k: int) -> TracedGraph:
    """`layer(x [T, D], ids [T, K], p)` behind a router, weighted and summed."""
    p = parameters()

    def run(x: Tensor, logits: Tensor, p: dict[str, Tensor]) -> Tensor:
        w, ids = logits.softmax(-1).topk(top_k, dim=-1)
        y = layer(x, ids, p)
        return (y.reshape(TOKENS, top_k, -1) * w.unsqueeze(-1)).sum(1)

    return traced(run, *layer_inputs(top_k), p)


def token_of(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[0]).unsqueeze(1).expand(-1, ids.shape[1]).reshape(-1)


def column_bmm(x: Tensor, ids: Tensor, p: dict[str, Tensor]) -> Tensor:
    flat = ids.reshape(-1)
    h = torch.bmm(p["w1"][flat], x[token_of(ids)].unsqueeze(-1)).squeeze(-1) + p["b1"][flat]
    return torch.bmm(p["w2"][flat], F.gelu(h).unsqueeze(-1)).squeeze(-1) + p["b2"][flat]


def row_bmm(x: Tensor, ids: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Weights stored as [E, in, out], biases added before the squeeze."""
    flat = ids.reshape(-1)
    rows = x.repeat_interleave(ids.shape[1], dim=0)
    h = torch.bmm(rows.unsqueeze(1), p["w2"][flat]) + p["b1"][flat].unsqueeze(1)
    return torch.bmm(F.silu(h), p["w1"][flat]).squeeze(1)


def transposed_bmm(x: Tensor, ids: Tensor, p: dict[str, Tensor]) -> Tensor:
    """The transpose taken behind the gather, and a cast; rows by expand and reshape."""
    flat = ids.reshape(-1)
    rows = x.unsqueeze(1).expand(-1, ids.shape[1], -1).reshape(-1, DIM)
    h = rows.unsqueeze(1) @ p["w1"].half()[flat].float().transpose(1, 2)
    return (F.gelu(h) @ p["w2"][flat].mT).squeeze(1)


def matmul_columns(x: Tensor, ids: Tensor, p: dict[str, Tensor]) -> Tensor:
    rows = x.repeat(1, ids.shape[1]).view(-1, DIM)
    h = torch.matmul(p["w1"][ids.flatten()], rows[..., None])
    h = F.relu(h + p["b1"][ids.flatten()][..., None])
    return torch.matmul(p["w2"][ids.flatten()], h)[..., 0]


def flat_einsum(x: Tensor, ids: Tensor, p: dict[str, Tensor]) -> Tensor:
    flat = ids.reshape(-1)
    rows = x.index_select(0, torch.arange(TOKENS).repeat_interleave(ids.shape[1]))
    h = torch.einsum("si,soi->so", rows, p["w1"].index_select(0, flat))
    return torch.einsum("sio,si->so", p["w1"][flat], F.silu(h))


def slot_einsum(x: Tensor, ids: Tensor, p: dict[str, Tensor]) -> Tensor:
    """[T, K, ...] is never flattened; the token's row broadcasts over its slots."""
    h = torch.einsum("td,tkfd->tkf", x, p["w1"][ids]) + p["b1"][ids]
    return torch.einsum("tkf,tkdf->tkd", F.gelu(h), p["w2"][ids]) + F.embedding(ids, p["b2"])


def slot_matmul(x: Tensor, ids: Tensor, p: dict[str, Tensor]) -> Tensor:
    h = torch.matmul(p["w1"][ids], x[:, None, :, None])  # [T, K, F, 1]
    return torch.matmul(p["w2"][ids], F.gelu(h)).squeeze(-1)


def added_bmm(x: Tensor, ids: Tensor, p: dict[str, Tensor]) -> Tensor:
    flat = ids.to(torch.int32).reshape(-1)
    rows = x[token_of(ids)].unsqueeze(1)
    h = torch.baddbmm(p["b1"][flat].unsqueeze(1), rows, p["w2"][flat])
    return torch.baddbmm(p["b2"][flat].unsqueeze(1), F.gelu(h), p["w1"][flat]).squeeze(1)


def split_gate(x: Tensor, ids: Tensor, p: dict[str, Tensor]) -> Tensor:
    """The gathered weight is cut in two, one part scaled; the row is normalised per branch."""
    flat = ids.reshape(-1)
    gate, up = p["gate"][flat].chunk(2, dim=1)
    rows = F.layer_norm(x[token_of(ids)], (DIM,)).unsqueeze(-1)
    h = F.silu(gate @ rows) * ((0.5 * up) @ rows)
    return (p["w2"][flat] @ h).squeeze(-1) + x[token_of(ids)]


def clamped(x: Tensor, ids: Tensor, p: dict[str, Tensor]) -> Tensor:
    """The shape of the ids is known from in front of an elementwise op."""
    flat = ids.reshape(-1).clamp(0, EXPERT_COUNT - 1)
    return torch.bmm(p["w1"][flat], x[token_of(ids)].unsqueeze(-1)).squeeze(-1)


def scaled_by_all(x: Tensor, ids: Tensor, p: dict[str, Tensor]) -> Tensor:
    """A factor that all experts share."""
    h = torch.bmm(p["w1"][ids.flatten()], x[token_of(ids)].unsqueeze(-1)).squeeze(-1)
    return h * p["b1"][0].sigmoid()


SPELLINGS: dict[str, Layer] = {
    f.__name__: f
    for f in (
        column_bmm,
        row_bmm,
        transposed_bmm,
        matmul_columns,
        flat_einsum,
        slot_einsum,
        slot_matmul,
        added_bmm,
        split_gate,
        clamped,
        scaled_by_all,
    )
}


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling(spelling: str, top_k: int) -> None:
    graph = layer_graph(SPELLINGS[spelling], top_k)
    expected = graph.run()
    report = NormalizeGathered().run(graph.gm)
    verify(graph.gm, report.name)
    assert report.missed == ()
    assert report.changed == 1, graph.text()
    (routed,) = graph.routed
    ids, rows = routed.args[1], routed.args[2]
    assert list(ids.meta["val"].shape) == [TOKENS, top_k]
    assert [list(r.meta["val"].shape) for r in rows] == [[TOKENS, DIM]]
    products = {aten.bmm.default, aten.matmul.default, aten.baddbmm.default, aten.einsum.default}
    assert not products & set(graph.targets)
    assert relative_error(graph.run(), expected) < 1e-5
    # With one slot the rows are the normalised ones, so the inner residual stays outside.
    if (spelling, top_k) != ("split_gate", 1):
        (region,) = match_regions(graph.gm).moe
        assert (region.num_experts, region.top_k) == (EXPERT_COUNT, top_k)


def rows_of_another_token(x: Tensor, ids: Tensor, p: dict[str, Tensor]) -> Tensor:
    other = torch.arange(ids.numel()) % TOKENS  # slot-major rows, token-major ids
    return torch.bmm(p["w1"][ids.reshape(-1)], x[other].unsqueeze(-1))


def rows_of_a_longer_table(x: Tensor, ids: Tensor, p: dict[str, Tensor]) -> Tensor:
    rows = torch.cat([x, x])[token_of(ids)]
    return torch.bmm(p["w1"][ids.reshape(-1)], rows.unsqueeze(-1))


def fixed_experts(x: Tensor, ids: Tensor, p: dict[str, Tensor]) -> Tensor:
    fixed = torch.arange(ids.numel()) % EXPERT_COUNT
    return torch.bmm(p["w1"][fixed], x[token_of(ids)].unsqueeze(-1))


def weighted_input(x: Tensor, ids: Tensor, p: dict[str, Tensor]) -> Tensor:
    """What the expert reads differs from slot to slot."""
    rows = x[token_of(ids)] * x[:, : ids.shape[1]].sigmoid().reshape(-1, 1)
    return torch.bmm(p["w1"][ids.reshape(-1)], rows.unsqueeze(-1))


def several_rows(x: Tensor, ids: Tensor, p: dict[str, Tensor]) -> Tensor:
    rows = x[token_of(ids)].unsqueeze(-1).expand(-1, -1, 2)
    return torch.bmm(p["w1"][ids.reshape(-1)], rows)


def mixed_branches(x: Tensor, ids: Tensor, p: dict[str, Tensor]) -> Tensor:
    h = torch.einsum("td,tkfd->tkf", x, p["w1"][ids]).softmax(dim=1)
    return torch.einsum("tkf,tkdf->tkd", h, p["w2"][ids])


NEAR_MISSES: dict[str, tuple[Layer, str, Any]] = {
    "rows of another token": (rows_of_another_token, "not the row of token t", aten.index.Tensor),
    "rows of a longer table": (
        rows_of_a_longer_table,
        "not the row of token t",
        aten.index.Tensor,
    ),
    "experts not routed": (fixed_experts, "indexed by a constant", aten.index.Tensor),
    "weighted input": (weighted_input, "neither an expert's parameter nor a token's row", None),
    "several rows": (several_rows, "several rows for each branch", aten.bmm.default),
    "mixed branches": (mixed_branches, "mixes token rows", aten.softmax.int),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss_stays_as_written(case: str) -> None:
    layer, reason, target = NEAR_MISSES[case]
    graph = layer_graph(layer, 2)
    text = graph.text()
    report = NormalizeGathered().run(graph.gm)
    assert report.changed == 0
    assert graph.text() == text
    (miss,) = report.missed
    assert miss.kind == "moe"
    assert reason in miss.reason
    assert target is None or miss.node.target is target


def test_index_that_is_no_integer_is_reported() -> None:
    """A mask picks as many matrices as it has ones: not a list of branches."""
    graph = layer_graph(column_bmm, 2)
    mask = next(n for n in graph.gm.graph.nodes if n.target is aten.reshape.default)
    with mask.meta["val"].fake_mode:
        mask.meta["val"] = torch.empty(TOKENS * 2, dtype=torch.bool)
    text = graph.text()
    report = NormalizeGathered().run(graph.gm)
    assert (report.changed, graph.text()) == (0, text)
    assert {m.reason for m in report.missed} == {
        "an expert's weight is indexed by torch.bool, not by integer routing ids"
    }


def test_two_layers_routed_alike_stay_two_layers() -> None:
    p = parameters()

    def run(x: Tensor, logits: Tensor, p: dict[str, Tensor]) -> Tensor:
        w, ids = logits.topk(2, dim=-1)
        for _ in range(2):
            y = column_bmm(x, ids, p).view(TOKENS, 2, -1)
            x = x + (y * w.unsqueeze(-1)).sum(1)
        return x

    graph = traced(run, *layer_inputs(2), p)
    expected = graph.run()
    assert NormalizeGathered().run(graph.gm).changed == 2
    assert relative_error(graph.run(), expected) < 1e-5
    first, second = graph.routed
    assert first.args[1] is second.args[1]
    assert first.args[2] != second.args[2]
