"""Models as a user gives them to `moeca bench`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moeca_compile.speed.networks import SIZES, Network, build, call

SIZE = SIZES["tiny"]


def pair() -> tuple[nn.Module, dict[str, Tensor]]:
    x, t, y = call(SIZE, 2)
    return build(SIZE), {"x": x, "t": t, "y": y}


def no_timestep() -> tuple[nn.Module, tuple[Tensor]]:
    return nn.Linear(4, 4), (torch.randn(2, 4),)


class Sampler:
    """Three Euler steps, written in place; one peer that works and one that does not."""

    def __init__(self) -> None:
        self.model: Network = build(SIZE)
        self.peers = {"twice": _twice, "missing": _missing}

    def generate(self) -> Tensor:
        x, t, y = call(SIZE, 2)
        for _ in range(3):
            x -= 0.1 * self.model(x, t, y)
            t = t - 0.1
        return x


def _twice(model: nn.Module) -> Any:
    return lambda *args: [model(*args) for _ in range(2)][-1]


def _missing(model: nn.Module) -> Any:
    raise ImportError("no peer here")
