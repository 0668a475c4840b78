"""A third-party mixture of experts inside the tiny denoiser of `tests/idioms`.

Denoiser: patches, timestep, adaLN blocks with attention; its `blocks[i].moe` is the foreign module.
The pieces the float64 reference asks of a layer are restated here, row by row, in the dtype of the
weights; the foreign forward itself stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compat.case import Built, fill
from idioms import inputs
from idioms.config import IdiomConfig
from idioms.denoiser import Denoiser

STEPS = 8
DIM, EXPERTS, TOP_K, HIDDEN = 32, 6, 2, 24


class ForeignMoE(nn.Module):
    """`inner(x [B, N, D]) -> [B, N, D]`, or a tuple that starts with it.

    Subclasses restate the router, one expert and the shared experts for the reference.
    """

    takes_labels = False

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.num_experts, self.top_k = EXPERTS, TOP_K

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return out[0] if isinstance(out, tuple) else out

    def router(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids [T, K] of rows [T, D]."""
        raise NotImplementedError

    def route(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The same; the reference hands over the samples' labels."""
        return self.router(rows)

    def one_expert(self, expert: int, rows: Tensor) -> Tensor:
        """Expert number `expert` on rows [T, D]; here: fused gate and up projection, SiLU."""
        bank = self.inner.experts
        gate, up = F.linear(rows, bank.gate_up_proj[expert]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, bank.down_proj[expert])

    def shared_rows(self, rows: Tensor) -> Tensor:
        """The shared experts on rows [T, D]."""
        return torch.zeros_like(rows)


def denoiser(
    make_moe: Callable[[], ForeignMoE], *, attention: str = "sdpa", dtype: torch.dtype | None = None
) -> Built:
    """One block, 16 tokens of width 32, batch of two; calls of one generation."""
    config = IdiomConfig(
        idiom="I8",
        router="softmax",
        expert="swiglu",
        top_k=TOP_K,
        num_experts=EXPERTS,
        shared=0,
        attention=attention,
        dim=DIM,
        depth=1,
        heads=2,
        tokens=16,
    )
    model = Denoiser(config)
    for block in model.blocks:
        block.moe = make_moe()
    fill(model, seed=0)
    x, t, y = inputs(model)
    generator = torch.Generator().manual_seed(7)
    calls: list[dict[str, Any]] = []
    for step in range(STEPS):
        calls.append({"x": x if dtype is None else x.to(dtype), "t": t - 0.1 * step, "y": y})
        x = x + 0.05 * torch.randn(x.shape, generator=generator)
    return model if dtype is None else model.to(dtype), calls
