"""A subject of a few milliseconds: random weights, four Euler steps.

look_at("tiny", tiny), or on the command line tests/bench/tiny_subject.py:tiny
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from idioms import make

CALLS: list[tuple[str, int, int]] = []  # (sampler, seed, steps) of every generation


class Tiny:
    """Images [samples, 3, 8, 8]."""

    samplers = {"euler": 4, "other": 4}
    settings = {"step": 0.05}

    def __init__(self) -> None:
        self.model = make("I8", depth=1, num_experts=4)

    def sample(self, model: Any, sampler: str, seed: int, samples: int, steps: int) -> Tensor:
        CALLS.append((sampler, seed, steps))
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(samples, 3, 8, 8, generator=generator)
        labels = torch.arange(samples) % 10
        for index in range(steps):
            t = torch.full((samples,), 1.0 - index / steps)
            x = x - model(x, t, labels) * (self.settings["step"] / steps)
        return x

    def accuracy(self, images: Tensor) -> float:
        return (images.mean((1, 2, 3)) > 0).double().mean().item()

    def features(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def tiny() -> Tiny:
    return Tiny()
