"""Sampling loops without a network: what a denoiser is called with, step by step.

    calls = euler(20, seed=3)  ->  [(1.0, x [2, 4, 32, 32]), (0.95, x'), ...]

The sample moves as with a perfect denoiser: x_t = (1 - t) image + t noise (flow), or
image + sigma noise. Images are smooth and share a bright background, as real ones do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate

Call = tuple[float, Tensor]
BATCH = 2


def image(seed: int, batch: int = BATCH) -> Tensor:
    """[B, 4, 32, 32], smooth, with a mean of 0.8 shared by all images."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 4, 4, 4, generator=g)
    return 0.8 + 0.7 * interpolate(coarse, size=(32, 32), mode="bilinear")


def noise(seed: int, batch: int = BATCH) -> Tensor:
    """[B, 4, 32, 32] unit Gaussian."""
    return torch.randn(batch, 4, 32, 32, generator=torch.Generator().manual_seed(10_000 + seed))


def flow(t: float, seed: int, batch: int = BATCH) -> Tensor:
    """The sample at noise level t in [0, 1]."""
    return (1 - t) * image(seed, batch) + t * noise(seed, batch)


def euler(
    steps: int, seed: int = 0, start: float = 1.0, batch: int = BATCH, shift: float = 1.0
) -> list[Call]:
    """Falling t from `start`; shift > 1 spends more steps on the noisy end."""
    plain = [start * (1 - i / steps) for i in range(steps)]
    times = [shift * t / (1 + (shift - 1) * t) for t in plain]
    return [(t, flow(t, seed, batch)) for t in times]


def heun(steps: int, seed: int = 0) -> list[Call]:
    """t_i, t_i+1 (predictor), t_i+1 again with the corrected sample."""
    calls: list[Call] = []
    for i, (t, x) in enumerate(euler(steps, seed)):
        if i:
            calls.append((t, x + 0.004 * noise(seed + 77)))
        calls.append((t, x))
    return calls


def karras(steps: int, seed: int = 0) -> list[Call]:
    """Sigma space 80 .. 0.002, unscaled sample, timestep log(sigma) / 4."""
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    sigmas = [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)]
    return [(math.log(s) / 4, image(seed) + s * noise(seed)) for s in sigmas]


def ddim(steps: int, seed: int = 0) -> list[Call]:
    """Integer timesteps 999 .. , variance preserving."""
    keep = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
    times = [int(t) for t in torch.linspace(999, 0, steps + 1)[:-1]]
    return [(t, keep[t].sqrt() * image(seed) + (1 - keep[t]).sqrt() * noise(seed)) for t in times]


def ancestral(steps: int, seed: int = 0) -> list[Call]:
    """Euler ancestral on sigmas 14.6 .. 0.03: almost half of the noise is new at every step."""
    high, low = 14.6 ** (1 / 7), 0.03 ** (1 / 7)
    sigmas = [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)]
    clean, x = image(seed), image(seed) + sigmas[0] * noise(seed)
    calls: list[Call] = []
    for i, (now, after) in enumerate(zip(sigmas, [*sigmas[1:], 0.0])):
        calls.append((now, x))
        up = after * math.sqrt(max(now**2 - after**2, 0.0)) / now
        down = math.sqrt(max(after**2 - up**2, 0.0))
        x = clean + down * (x - clean) / now + up * noise(seed * 1000 + i + 1)
    return calls
