"""The two training objectives: what is added to an image, and what the network must predict.

    flow     t logit-normal in (0, 1)   x_t = (1 - t) * x0 + t * noise    target noise - x0
    epsilon  t uniform in 0 .. 999      x_t = sqrt(a) * x0 + sqrt(1 - a) * noise, a = alpha_bar[t]
                                        target noise, its squared error divided by a

Both return a Task for a batch of clean images x0 [B, 1, 32, 32].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..fashion_epsilon.schedule import TIMESTEPS, alpha_bars

ALPHA_BARS = alpha_bars().float()

MIN_ALPHA = 1e-3  # bounds the weight of almost pure noise


@dataclass(frozen=True)
class Task:
    """What the network sees, what it should say, and how much each image counts."""

    noisy: Tensor  # [B, 1, 32, 32]
    t: Tensor  # [B]
    target: Tensor  # [B, 1, 32, 32]
    weight: Tensor  # [B]

    def loss(self, output: Tensor) -> Tensor:
        """Weighted mean squared error."""
        return ((output - self.target).square().mean((1, 2, 3)) * self.weight).mean()


Objective = Callable[[Tensor, torch.Generator], Task]


def flow(images: Tensor, generator: torch.Generator) -> Task:
    """Rectified flow; times near the middle of the path are drawn more often (logit-normal)."""
    noise = torch.randn(images.shape, generator=generator)
    t = torch.randn(len(images), generator=generator).sigmoid()
    mix = t[:, None, None, None]
    return Task((1 - mix) * images + mix * noise, t, noise - images, torch.ones_like(t))


def epsilon(images: Tensor, generator: torch.Generator) -> Task:
    """Noise prediction on the discrete variance-preserving schedule of examples/fashion_epsilon.

    A sample of much noise shows most of the noise itself, so its plain error is small although the
    outline of the image is decided there. Over alpha_bar all noise levels count alike: the weight
    of v-prediction, Salimans & Ho 2022, arXiv:2202.00512 section 4.
    """
    noise = torch.randn(images.shape, generator=generator)
    t = torch.randint(TIMESTEPS, (len(images),), generator=generator)
    alpha = ALPHA_BARS[t]
    mix = alpha[:, None, None, None]
    noisy = mix.sqrt() * images + (1 - mix).sqrt() * noise
    return Task(noisy, t, noise, 1 / alpha.clamp(min=MIN_ALPHA))
