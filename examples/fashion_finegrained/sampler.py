"""Euler sampling with classifier-free guidance, along the straight path from noise to image.

images = sample(model, labels, steps=50, cfg_scale=1.5, seed=0)
x <- x - dt * (v_uncond + cfg_scale * (v_cond - v_uncond)),  t falling from 1 to 0
"""

from collections.abc import Callable

import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def sample(
    model: Model, labels: Tensor, steps: int = 50, cfg_scale: float = 1.5, seed: int = 0
) -> Tensor:
    """labels [B] -> images [B, 1, 32, 32] in [-1, 1].

    The model runs once a step on 2B rows, [conditional; unconditional], with t of shape [2B].
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), 1, 32, 32, generator=generator)
    both = torch.cat([labels, torch.full_like(labels, 10)])  # 10: no class
    times = torch.linspace(1.0, 0.0, steps + 1)
    for t, t_next in zip(times[:-1], times[1:]):
        cond, uncond = model(torch.cat([x, x]), t.expand(len(both)), both).chunk(2)
        velocity = uncond + cfg_scale * (cond - uncond)
        x = x - (t - t_next) * velocity
    return x.clamp(-1, 1)
