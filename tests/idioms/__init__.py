"""Tiny diffusion transformers with mixture-of-experts, one per way real code writes the dispatch.

Own re-creations for tests. Every weight is random and non-zero, adaLN gates and heads included, so
that no comparison passes because a branch of the network is silent.

    model = make("I1", router="softmax", expert="mlp", top_k=2, attention="sdpa")
    x, t, y = inputs(model, batch=2)
    out = model(x, t, y)                      # [B, C, H, W]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from idioms.attention import ATTENTIONS
from idioms.config import IdiomConfig
from idioms.denoiser import Denoiser
from idioms.dispatch import DISPATCHES, EXPERT_CHOICE
from idioms.experts import EXPERTS
from idioms.routers import ROUTERS

__all__ = [
    "ATTENTIONS",
    "DISPATCHES",
    "EXPERTS",
    "EXPERT_CHOICE",
    "ROUTERS",
    "IdiomConfig",
    "fill_random",
    "inputs",
    "make",
    "trajectory",
]


def make(
    idiom: str,
    *,
    router: str = "softmax",
    expert: str = "mlp",
    top_k: int = 2,
    num_experts: int = 8,
    shared: int = 1,
    attention: str = "sdpa",
    dim: int = 32,
    depth: int = 2,
    heads: int = 2,
    tokens: int = 16,
    seed: int = 0,
) -> Denoiser:
    """A denoiser `forward(x [B, C, H, W], t [B], y [B]) -> [B, C, H, W]`, float32, eval mode.

    idiom: a key of `DISPATCHES`; router: of `ROUTERS`; expert: of `EXPERTS`; attention: of
    `ATTENTIONS`. `tokens` must be a square number; the image side is twice its root.
    Raises KeyError for an unknown name, ValueError for impossible sizes.
    """
    for name, table in (
        (idiom, DISPATCHES),
        (router, ROUTERS),
        (expert, EXPERTS),
        (attention, ATTENTIONS),
    ):
        if name not in table:
            raise KeyError(f"unknown {name!r}; one of {sorted(table)}")
    config = IdiomConfig(
        idiom=idiom,
        router=router,
        expert=expert,
        top_k=top_k,
        num_experts=num_experts,
        shared=shared,
        attention=attention,
        dim=dim,
        depth=depth,
        heads=heads,
        tokens=tokens,
    )
    model = Denoiser(config)
    fill_random(model, seed)
    return model.eval().requires_grad_(False)


def fill_random(model: nn.Module, seed: int) -> None:
    """Fill parameters and learnt buffers of `model` with seeded non-zero values of useful size."""
    generator = torch.Generator().manual_seed(seed)
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, value in named.items():
            if name.endswith((".cos", ".sin")):  # positions, not learnt
                continue
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float32)
            value.copy_(_scaled(name, noise))


def _scaled(name: str, noise: Tensor) -> Tensor:
    """Noise of the size that fits the parameter called `name`."""
    if name.endswith("frequencies"):  # time features: a few periods over t in [0, 1]
        return 4.0 * noise
    if "norm" in name and noise.dim() == 1:
        return 1.0 + 0.1 * noise
    if name.endswith("correction_bias"):  # selection only: large enough to change it
        return 0.2 * noise
    if noise.dim() == 1:
        return 0.1 * noise
    if name.endswith(("y_embed.weight", "pos")):
        return 0.5 * noise
    fan_in = math.prod(noise.shape[1:]) if noise.dim() != 3 else noise.shape[-1]
    gain = 2.0 if "router" in name else 1.0
    return gain * noise / math.sqrt(fan_in)


def inputs(model: Denoiser, batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """One call's arguments: x [B, C, H, W], t [B] (all equal), y [B].

    The last sample is unlabelled where the dispatch looks at labels.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    x = torch.randn(batch, config.channels, config.side, config.side, generator=generator)
    y = torch.randint(0, config.num_classes, (batch,), generator=generator)
    if DISPATCHES[config.idiom].takes_labels:
        y[-1] = config.num_classes
    return x, torch.full((batch,), 0.9), y


def trajectory(
    model: Denoiser, steps: int, batch: int = 2, seed: int = 1, dx: float = 0.15
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Arguments of `steps` calls of one generation: t falls from 0.9, x drifts by `dx` a step.

    The drift is as large as in a coarse sampler, so that reuse steps see changed experts.
    """
    x, t, y = inputs(model, batch, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    calls = []
    for index in range(steps):
        calls.append((x.clone(), t - 0.8 * index / max(steps, 1), y))
        x = x + dx * torch.randn(x.shape, generator=generator)
    return calls
