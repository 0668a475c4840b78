"""DDIM and DDPM sampling with classifier-free guidance, on evenly spaced timesteps.

    generator = torch.Generator().manual_seed(0)
    images = ddim(model, labels, steps=50, generator=generator)     only the first noise is random
    images = ddpm(model, labels, steps=100, generator=generator)    fresh noise after every step

All noise comes from `generator`: two models sampled with equal seeds get equal noise, also at
every ancestral step. The model runs on 2B rows a step, [conditional; unconditional].
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .schedule import alpha_bars, spaced

Model = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def ddim(
    model: Model,
    labels: Tensor,
    steps: int = 50,
    cfg_scale: float = 1.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """labels [B] -> images [B, 1, 32, 32] in [-1, 1], deterministic given the first noise.

    Song et al. 2020, arXiv:2010.02502 eq. 12 with sigma = 0.
    """
    x, path = _start(labels, steps, generator)
    for t, alpha, alpha_next in path:
        clean, eps = _predict(model, x, t, alpha, labels, cfg_scale)
        x = math.sqrt(alpha_next) * clean + math.sqrt(1 - alpha_next) * eps
    return x.clamp(-1, 1)


@torch.no_grad()
def ddpm(
    model: Model,
    labels: Tensor,
    steps: int = 100,
    cfg_scale: float = 1.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """labels [B] -> images [B, 1, 32, 32] in [-1, 1], from the posterior at every step.

    Ho et al. 2020, arXiv:2006.11239 eq. 6-7, with the betas of the spaced timesteps.
    """
    x, path = _start(labels, steps, generator)
    for t, alpha, alpha_next in path:
        clean, _ = _predict(model, x, t, alpha, labels, cfg_scale)
        keep = alpha / alpha_next  # 1 - beta between the two timesteps
        from_clean = math.sqrt(alpha_next) * (1 - keep) / (1 - alpha)
        from_x = math.sqrt(keep) * (1 - alpha_next) / (1 - alpha)
        variance = (1 - keep) * (1 - alpha_next) / (1 - alpha)  # 0 at the last step
        noise = torch.randn(x.shape, generator=generator)
        x = from_clean * clean + from_x * x + math.sqrt(variance) * noise
    return x.clamp(-1, 1)


def _start(
    labels: Tensor, steps: int, generator: torch.Generator | None
) -> tuple[Tensor, list[tuple[int, float, float]]]:
    """First noise, and per step (timestep, its alpha_bar, alpha_bar of the next timestep)."""
    x = torch.randn(len(labels), 1, 32, 32, generator=generator)
    timesteps = spaced(steps)
    alphas = alpha_bars()[timesteps].tolist()
    return x, list(zip(timesteps.tolist(), alphas, [*alphas[1:], 1.0]))


def _predict(
    model: Model, x: Tensor, t: int, alpha: float, labels: Tensor, cfg_scale: float
) -> tuple[Tensor, Tensor]:
    """Guided estimate of the clean image, clipped to [-1, 1], and the noise that goes with it."""
    timestep = torch.full((2 * len(labels),), t, dtype=torch.int64)
    no_class = torch.full_like(labels, 10)
    eps = model(torch.cat([x, x]), timestep, torch.cat([labels, no_class]))
    cond, uncond = eps.chunk(2)
    eps = uncond + cfg_scale * (cond - uncond)
    clean = ((x - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)).clamp(-1, 1)
    return clean, (x - math.sqrt(alpha) * clean) / math.sqrt(1 - alpha)
