"""The variance-preserving noise schedule: 1000 discrete timesteps, cosine (Nichol & Dhariwal 2021).

x_t = sqrt(alpha_bar[t]) * x0 + sqrt(1 - alpha_bar[t]) * noise
alpha_bars()  [1000] float64   ~1 at t = 0 (image) ... ~0 at t = 999 (noise)
spaced(50)    [50] int64       999, 979, ... 0: the timesteps a sampler visits
"""

import math

import torch
from torch import Tensor

TIMESTEPS = 1000
_OFFSET = 0.008  # keeps the first betas from being too small, arXiv:2102.09672 eq. 17
_MAX_BETA = 0.999


def alpha_bars(count: int = TIMESTEPS) -> Tensor:
    """Product of (1 - beta) up to each timestep, [count] float64, falling."""
    edge = torch.arange(count + 1, dtype=torch.float64) / count
    level = ((edge + _OFFSET) / (1 + _OFFSET) * math.pi / 2).cos().square()
    beta = (1 - level[1:] / level[:-1]).clamp(max=_MAX_BETA)
    return (1 - beta).cumprod(0)


def spaced(steps: int, count: int = TIMESTEPS) -> Tensor:
    """`steps` timesteps spread evenly from count - 1 down to 0, int64.

    Raises ValueError unless 2 <= steps <= count.
    """
    if not 2 <= steps <= count:
        raise ValueError(f"steps is {steps}; expected 2 to {count}")
    return torch.linspace(count - 1, 0, steps, dtype=torch.float64).round().long()
