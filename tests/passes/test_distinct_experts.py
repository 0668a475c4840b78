"""No token names an expert twice after the pass; sums of weighted experts stay what they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moeca_compile
from aten_graphs import traced
from idioms import ROUTERS, inputs, make
from moeca_compile.passes.distinct_experts import DistinctExperts, distinct_ids, merged_weights
from moeca_compile.passes.normalize_gathered import NormalizeGathered
from moeca_compile.passes.verify import verify

EXPERTS = 5


def tables() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(0, EXPERTS, (20, k), generator=generator) for k in (2, 3, 5)]
    return [*drawn, torch.full((4, 3), 4), torch.tensor([[0, 1], [3, 3]]), drawn[1].int()]


@pytest.mark.parametrize("ids", tables(), ids=lambda t: "x".join(map(str, t.shape)))
def test_distinct_and_the_same_sum_per_expert(ids: Tensor) -> None:
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) + 0.1
    numbers, same = distinct_ids(ids, EXPERTS)
    merged = merged_weights(weights, same)
    assert numbers.dtype == ids.dtype
    assert all(len(set(row)) == len(row) for row in numbers.tolist())
    assert int(numbers.min()) >= 0 and int(numbers.max()) < EXPERTS
    sums = [
        torch.zeros(len(ids), EXPERTS).scatter_add(1, i.long(), w)
        for i, w in ((ids, weights), (numbers, merged))
    ]
    torch.testing.assert_close(*sums)
    unrepeated = torch.tensor([len(set(row)) == len(row) for row in ids.tolist()])
    assert torch.equal(numbers[unrepeated], ids[unrepeated])
    assert torch.equal(merged[unrepeated], weights[unrepeated])


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_ids_of_one_ranking_are_left_alone(router: str) -> None:
    model = make("I8", router=router, depth=1)
    graph = traced(model, *inputs(model))
    NormalizeGathered().run(graph.gm)
    assert DistinctExperts().run(graph.gm).changed == 0


class Repeating(nn.Module):
    """Slots chosen one by one, so that both may name the same expert."""

    def __init__(self, weights_first: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(EXPERTS, 6, 6), requires_grad=False)
        self.gates = nn.Parameter(torch.randn(2, EXPERTS, 6), requires_grad=False)
        self.weights_first = weights_first

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.einsum("td,ked->tke", x, self.gates).softmax(-1)
        weights, ids = scores.max(-1)
        flat = ids.reshape(-1)
        rows = x[torch.arange(x.shape[0]).repeat_interleave(2)]
        out = torch.bmm(self.w[flat], rows.unsqueeze(-1)).squeeze(-1)
        if self.weights_first:
            return (out * weights.reshape(-1, 1)).view(-1, 2, 6).sum(1) + weights.mean()
        return (out.view(-1, 2, 6) * weights.unsqueeze(-1)).sum(1)


@pytest.mark.parametrize("weights_first", [True, False])
def test_a_router_that_repeats_itself(weights_first: bool) -> None:
    torch.manual_seed(0)
    model = Repeating(weights_first)
    x = torch.randn(16, 6)
    graph = traced(model, x)
    expected = graph.run()
    assert NormalizeGathered().run(graph.gm).changed == 1
    report = DistinctExperts().run(graph.gm)
    verify(graph.gm, report.name)
    assert report.changed == 1
    torch.testing.assert_close(graph.run(), expected)
    assert DistinctExperts().run(graph.gm).changed == 0
    explained = moeca_compile.explain(model, x)
    assert [r.matched for r in explained.regions] == [True]
