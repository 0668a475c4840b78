"""A user's model and sampling function, as small as they get.

generate(denoiser(), seed=0) -> [2, 3, 8, 8]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from idioms import make
from idioms.denoiser import Denoiser

STEPS = 16


def denoiser(seed: int = 0, dim: int = 32) -> Denoiser:
    """One layer of four experts."""
    return make("split", depth=1, num_experts=4, seed=seed, dim=dim)


def generate(model: Any, seed: int) -> Tensor:
    """Euler steps from noise that `seed` decides."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    with torch.no_grad():
        for index in range(STEPS):
            t = torch.full((2,), 1 - index / STEPS)
            x = x - 0.06 * model(x, t, torch.arange(2))
    return x
