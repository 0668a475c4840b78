"""Eager reference of forecast and skip steps: module outputs replaced by polynomials, in float64.

reference = ForecastReference(model, order=1)      one of tests/idioms, copied to float64
reference.step(x, t, y, refresh=True)              eager output, layer outputs remembered
reference.step(x, t, y, refresh=False)             layers give what the polynomial says

Independent of the package: plain forward hooks on `attn` and `moe`, and numpy-style Lagrange.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def polynomial(points: list[tuple[float, Tensor]], now: float) -> Tensor:
    """Value at `now` of the polynomial through (time, value), by Neville's scheme."""
    values = [value for _, value in points]
    times = [time for time, _ in points]
    for width in range(1, len(points)):
        values = [
            ((now - times[i + width]) * values[i] - (now - times[i]) * values[i + 1])
            / (times[i] - times[i + width])
            for i in range(len(values) - 1)
        ]
    return values[0]


class ForecastReference:
    """Every `attn` and `moe` of the model's blocks, extrapolated through the last refreshes."""

    def __init__(self, model: nn.Module, order: int) -> None:
        self.model = copy.deepcopy(model).double()
        self.order = order
        self._refresh = True
        self._now = 0.0
        self._points: dict[str, list[tuple[float, Tensor]]] = {}
        for name, module in self.model.named_modules():
            if name.endswith((".attn", ".moe")):
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            points = self._points.setdefault(name, [])
            if self._refresh:
                points.insert(0, (self._now, output))
                del points[self.order + 1 :]
                return output
            return polynomial(points, self._now)

        return replace

    @torch.no_grad()
    def step(self, x: Tensor, t: Tensor, y: Tensor, *, refresh: bool) -> Tensor:
        """Output in float64."""
        self._refresh, self._now = refresh, float(t[0])
        return self.model(x.double(), t.double(), y)
