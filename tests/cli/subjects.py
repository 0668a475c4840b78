"""Models as a user gives them to the command line, one per form of the contract."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from idioms import inputs, make, trajectory


def pair() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = make("I1", depth=1, num_experts=4)
    return model, inputs(model)


def keywords() -> tuple[nn.Module, dict[str, Tensor]]:
    model, (x, t, y) = pair()
    return model, {"x": x, "t": t, "y": y}


class Sampler:
    """Six steps on a given trajectory; the result is the last output."""

    options = {"policy": "moeca", "interval": 3, "tau": 0.5}

    def __init__(self) -> None:
        self.model: nn.Module = make("I8", depth=1, num_experts=4)
        self.calls = trajectory(self.model, 6, dx=0.05)  # type: ignore[arg-type]

    def generate(self) -> Tensor:
        with torch.no_grad():
            return [self.model(*call) for call in self.calls][-1]


def dense() -> tuple[nn.Module, tuple[Tensor]]:
    return nn.Linear(4, 4), (torch.randn(2, 4),)


def no_inputs() -> nn.Module:
    return nn.Linear(4, 4)


def needs_arguments(size: int) -> nn.Module:
    return nn.Linear(size, size)


class Seeded:
    """Sixteen Euler steps from noise that the seed decides."""

    def __init__(self) -> None:
        self.model: nn.Module = make("split", depth=1, num_experts=4)

    def generate(self, seed: int = 0) -> Tensor:
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            for index in range(16):
                x = x - 0.06 * self.model(x, torch.full((2,), 1 - index / 16), torch.arange(2))
        return x
