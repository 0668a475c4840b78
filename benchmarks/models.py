"""The models the benchmarks run: the demo's network, larger and with random weights.

    speed_model(depth)   D 384, 6 heads, 256 tokens, 8 SwiGLU experts top-2 + 1 shared, 1024 wide
    overhead_model()     a few tokens and one layer that every backend captures whole

Nothing is left at its zero initialisation: a gate of zero would make caching look exact. This is
also the one place that knows where examples/ and tests/ are; the benchmarks import from here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
# The benchmarks run from a checkout and measure the code that is tested and shown there.
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]

from fashion_ditmoe.model import Config, DiTMoE  # noqa: E402
from measurement import machine  # noqa: E402

from idioms import inputs, make  # noqa: E402

Call = tuple[Tensor, Tensor, Tensor]

__all__ = [
    "ROOT",
    "Call",
    "inputs",
    "machine",
    "overhead_model",
    "speed_calls",
    "speed_model",
]


def speed_model(depth: int, dtype: torch.dtype, seed: int = 0) -> DiTMoE:
    """The random-weight network of the speed benchmark, eval mode."""
    torch.manual_seed(seed)
    config = Config(
        image_size=32,
        channels=4,
        patch=2,
        dim=384,
        depth=depth,
        heads=6,
        expert_hidden=1024,
        shared_hidden=1024,
    )
    model = DiTMoE(config)
    for parameter in model.parameters():
        if not parameter.any():  # adaLN-Zero, head, biases
            nn.init.normal_(parameter, std=0.02)
    for block in model.blocks:  # spread the router's choices
        nn.init.normal_(block.moe.router.weight, std=config.dim**-0.5)
    return model.eval().requires_grad_(False).to(dtype)


def speed_calls(steps: int, batch: int, dtype: torch.dtype, seed: int = 0) -> list[Call]:
    """Arguments of one generation of `steps` calls: x drifts slowly, t falls from 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 32, 32, generator=generator)
    y = torch.randint(0, 10, (batch,), generator=generator)
    calls = []
    for index in range(steps):
        t = torch.full((batch,), 1.0 - 0.02 * index)
        calls.append((x.to(dtype), t, y))
        x = x + 0.05 * torch.randn(x.shape, generator=generator)
    return calls


def overhead_model() -> nn.Module:
    """So small that the call costs more than the arithmetic; one graph under plain Inductor."""
    return make("I8", expert="swiglu", top_k=1, num_experts=2, dim=32, depth=1, tokens=4)
