"""Contract "whole": one graph for the whole denoiser, nothing compiled after the first generation.

Through plain `torch.compile(model, backend="moeca")`, on the trained model and on a class that the
package has never seen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import moeca_compile
import moeca_compile.backend as backend_module
from examples.fashion_ditmoe.model import load_model
from idioms import make

FASHION = Path(__file__).parents[2] / "examples" / "fashion_ditmoe"
STEPS = 8


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 40), nn.Linear(40, width)

    def forward(self, rows: Tensor) -> Tensor:
        return self.second(F.silu(self.first(rows)))


class Mixture(nn.Module):
    """Sorts on the host, loops in Python, as published code of this kind does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pick = nn.Linear(width, 6, bias=False)
        self.workers = nn.ModuleList(Expert(width) for _ in range(6))

    def forward(self, tokens: Tensor) -> Tensor:
        flat = tokens.reshape(-1, tokens.shape[-1])
        gates, chosen = self.pick(flat).softmax(-1).topk(2, dim=-1)
        return self.send(flat, chosen.view(-1), gates.view(-1, 1)).view_as(tokens)

    @torch.no_grad()
    def send(self, flat: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        result = torch.zeros_like(flat)
        order = chosen.argsort()
        stops = chosen.bincount().cpu().numpy().cumsum(0)
        owner = order // 2
        for number, stop in enumerate(stops):
            start = 0 if number == 0 else stops[number - 1]
            if start == stop:
                continue
            rows = owner[start:stop]
            out = self.workers[number](flat[rows])
            out.mul_(gates[order[start:stop]])
            result.scatter_reduce_(0, rows.view(-1, 1).repeat(1, flat.shape[-1]), out, reduce="sum")
        return result


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = Mixture(width)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        b, n, d = h.shape
        q, k, v = self.qkv(self.before(h)).view(b, n, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + self.mix(self.between(h))


class ThreeLayers(nn.Module):
    """noisy [B, N, 16], noise_level [B], label [B] -> [B, N, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 32), nn.Linear(32, 16)
        self.labels = nn.Embedding(11, 32)
        self.layers = nn.ModuleList(Layer(32) for _ in range(3))

    def forward(self, noisy: Tensor, noise_level: Tensor, label: Tensor) -> Tensor:
        angle = noise_level[:, None] * torch.arange(1, 17)
        c = torch.cat([angle.sin(), angle.cos()], -1) + self.labels(label)
        h = self.inner(noisy) + c[:, None]
        for layer in self.layers:
            h = layer(h)
        return self.outer(h)


def unseen() -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    return ThreeLayers().eval(), (2, 16, 16)


def labelled() -> tuple[nn.Module, tuple[int, ...]]:
    """Python branches on masks and rows picked by masks in the router, a loop over experts."""
    return make("I4"), (2, 3, 8, 8)


def trained() -> tuple[nn.Module, tuple[int, ...]]:
    return load_model(FASHION), (2, 1, 32, 32)


@torch.no_grad()
def generate(denoise: Callable[..., Tensor], shape: tuple[int, ...], seed: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(shape[0])
    for step in range(STEPS):
        x = x - denoise(x, torch.full((shape[0],), 1 - step / STEPS), y) / STEPS
    return x


@pytest.mark.parametrize(
    "make_model",
    [
        labelled,
        pytest.param(unseen, marks=pytest.mark.slow),
        pytest.param(trained, marks=pytest.mark.slow),
    ],
    ids=["labelled", "unseen", "trained"],
)
def test_one_graph_and_nothing_compiled_after_the_first_generation(
    plain_graphs: list[str], monkeypatch: pytest.MonkeyPatch, make_model: Callable
) -> None:
    model, shape = make_model()
    backend_calls = []
    original = backend_module._compile

    def counted(gm: torch.fx.GraphModule, *rest: object) -> object:
        backend_calls.append(len(gm.graph.nodes))
        return original(gm, *rest)

    monkeypatch.setattr(backend_module, "_compile", counted)
    plain_graphs.clear()
    compiled = torch.compile(model, backend="moeca", options={"policy": "moeca"})
    generate(compiled, shape, seed=0)
    graphs, entered = counters["stats"]["unique_graphs"], len(backend_calls)
    torch._dynamo.utils.counters["recompiles"].clear()
    stats = moeca_compile.stats(compiled)
    # the first call ran in pieces, as they were: nothing was compiled that is not used again
    assert (stats.steps, stats.refresh_steps) == (STEPS - 1, 2)
    assert plain_graphs == []

    with torch.compiler.set_stance("fail_on_recompile"):
        generate(compiled, shape, seed=1)
        output = generate(compiled, shape, seed=2)
    assert counters["stats"]["unique_graphs"] == graphs
    assert len(backend_calls) == entered
    assert not counters["recompiles"]
    stats = moeca_compile.stats(compiled)
    assert stats.steps == STEPS - 1 + 2 * STEPS
    assert stats.generations == 3
    assert (stats.refresh_steps, stats.plain_steps) == (6, 0)
    eager = generate(model, shape, seed=2)
    assert (output - eager).norm() / eager.norm() < 0.2

    x, y = torch.randn(shape), torch.arange(shape[0])
    report = moeca_compile.explain(compiled, x, torch.full((shape[0],), 0.5), y)
    assert report.graph_breaks == 0
    assert [r.matched for r in report.regions] == [True] * 2 * len(stats.layers)
    assert len(stats.layers) == {unseen: 3, labelled: 2, trained: 6}[make_model]
