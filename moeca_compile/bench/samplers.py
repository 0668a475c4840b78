"""Samplers in which nothing but the model differs between two candidates.

denoise(x, point) -> (clean, eps)     what the model says at x = alpha * clean + sigma * eps
euler, heun, ancestral(denoise, x, path, ...) -> x at the path's end

`SharedNoise` makes fewer steps a fair rival: a step that spans three steps of the full run gets
the sum of their three noises, as one Brownian path watched less often. With independent noise the
two runs would make different pictures, and a paired distance would say nothing about the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Point:
    """One place of the path: x = alpha * clean + sigma * eps, at the model's time t."""

    t: float
    alpha: float
    sigma: float


Denoise = Callable[[Tensor, Point], tuple[Tensor, Tensor]]
Velocity = Callable[[Tensor, float], Tensor]


def straight_path(steps: int) -> list[Point]:
    """Rectified flow: alpha = 1 - t, sigma = t, `steps` equal steps from t = 1 to 0."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected 1 or more")
    return [Point(t, 1.0 - t, t) for t in torch.linspace(1.0, 0.0, steps + 1).tolist()]


def from_velocity(velocity: Velocity) -> Denoise:
    """`denoise` of a model that predicts v = eps - clean on the straight path."""

    def denoise(x: Tensor, point: Point) -> tuple[Tensor, Tensor]:
        v = velocity(x, point.t)
        return x - point.sigma * v, x + point.alpha * v

    return denoise


def euler(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """One model call a step: x <- x - (t - s) v(x, t)."""
    path = straight_path(steps)
    for now, after in zip(path, path[1:]):
        x = x - (now.t - after.t) * velocity(x, now.t)
    return x


def heun(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """Two calls a step, one in the last: 2 * steps - 1 (Karras et al. 2022, algorithm 1)."""
    path = straight_path(steps)
    for now, after in zip(path, path[1:]):
        gap = now.t - after.t
        first = velocity(x, now.t)
        guess = x - gap * first
        if after.t == 0:
            return guess
        x = x - gap * (first + velocity(guess, after.t)) / 2
    return x


@dataclass
class SharedNoise:
    """Standard normal noise per step, consistent between runs of different numbers of steps.

    generator: seeded, already past the first latent. cells: steps of the full run; each owns one
    noise. steps: of this run; with steps == cells a step gets exactly its own cell's noise.
    """

    generator: torch.Generator
    cells: int
    steps: int
    _drawn: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.cells = max(self.cells, self.steps)

    def draw(self, step: int, like: Tensor) -> Tensor:
        """Noise of `step`, counted from 0 and asked for in order; shape and dtype of `like`."""
        end = round((step + 1) * self.cells / self.steps)
        count = end - self._drawn
        self._drawn = end
        parts = [torch.randn(like.shape, generator=self.generator) for _ in range(count)]
        return (torch.stack(parts).sum(0) / math.sqrt(count)).to(like)


def ancestral(
    denoise: Denoise, x: Tensor, path: list[Point], eta: float, noise: SharedNoise
) -> Tensor:
    """Fresh noise after every step but the last: eta = 1 is the posterior of the process (DDPM).

    From t to s the posterior's deviation is sigma_s sqrt(1 - (alpha_t sigma_s / alpha_s sigma_t)^2)
    (Ho et al. 2020, eq. 7, for any alpha and sigma); eta scales it, 0 is DDIM
    (Song et al. 2020, eq. 16).
    """
    for step, (now, after) in enumerate(zip(path, path[1:])):
        clean, eps = denoise(x, now)
        kept = now.alpha * after.sigma / (after.alpha * now.sigma)
        up = eta * after.sigma * math.sqrt(max(0.0, 1.0 - kept**2))
        x = after.alpha * clean + math.sqrt(max(0.0, after.sigma**2 - up**2)) * eps
        x = x + up * noise.draw(step, x)
    return x
