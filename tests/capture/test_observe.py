"""The watched forward: what it notes, and what it keeps alive meanwhile."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from moeca_compile.capture.observe import observe


class Layer(nn.Module):
    def __init__(self, hidden: list[weakref.ref[Tensor]]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        hidden = x * 2
        self.hidden.append(weakref.ref(hidden))
        return self.run(hidden) + self.run(hidden)

    def run(self, hidden: Tensor) -> Tensor:
        own = hidden + 1
        self.hidden.append(weakref.ref(own))
        ids = torch.tensor([0, 1, 1])
        out = torch.zeros_like(own)
        for number, expert in enumerate(self.experts):
            out[ids == number] = expert(own[ids == number])
        return out


class Model(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.hidden: list[weakref.ref[Tensor]] = []
        self.layers = nn.ModuleList(Layer(self.hidden) for _ in range(layers))
        self.alive: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            self.alive.append(sum(ref() is not None for ref in self.hidden))
        return x


@torch.no_grad()
def test_a_layers_activations_are_gone_when_it_has_returned() -> None:
    model = Model(4)
    observe(model, (torch.randn(3, 4),), {})
    assert model.alive == [0] * 4


@torch.no_grad()
def test_only_the_first_call_of_a_function_is_counted() -> None:
    model = Model(2)
    x = torch.randn(3, 4)
    seen = observe(model, (x,), {})
    assert [site.rows for site in seen.sites] == [{0: 1, 1: 2}] * 2
    assert all(site.routed and site.uneven for site in seen.sites)
    assert torch.equal(seen.result, model(x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
