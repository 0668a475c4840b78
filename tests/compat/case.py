"""What one third-party model of the compatibility suite is made of.

CASE = Case("Mixtral block", "transformers", "I2", make, moe=2, attention=2, view=view_of)
model, calls = CASE.build()          # tiny, seeded, no weight zero; calls of one generation
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compat.checkouts import commit
from moeca_compile.debug.compat_suite import Absent
from reference_views import View

Call = dict[str, Any]
Built = tuple[nn.Module, list[Call]]


@dataclass(frozen=True)
class Case:
    """One model. make: -> (model, keyword arguments of successive calls of one generation).

    source: the distribution it is installed from, or "owner/repository" of a local checkout.
    moe, attention: layers and paired attention regions that must match. gap: what is missing
    although the model has it; empty when nothing is. view: how the float64 reference takes
    it apart; None where it cannot.
    sample, condition: names of the arguments that hold the noisy sample and the conditioning.
    captures: 2 where the first forward leaves a table in the module: Dynamo compiles once more.
    """

    name: str
    source: str
    idiom: str
    make: Callable[[], Built]
    moe: int
    attention: int
    sample: str
    condition: str
    gap: str = ""
    view: View | None = None
    captures: int = 1
    tolerance: float = 1e-5
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """Of the distribution or the checkout; empty where it is not there."""
        if "/" in self.source:
            return commit(self.source.split("/")[1])
        try:
            return metadata.version(self.source)
        except metadata.PackageNotFoundError:
            return ""

    @property
    def regions(self) -> int:
        """Layers and attention regions that must match."""
        return self.moe + self.attention

    def built(self) -> Built:
        """The model in eval mode without gradients. Raises Absent where it cannot be had."""
        if "/" not in self.source and importlib.util.find_spec(self.source) is None:
            raise Absent(f"{self.source} is not installed")
        model, calls = self.make()
        return model.eval().requires_grad_(False), calls

    def build(self) -> Built:
        """The same; skips the test instead."""
        try:
            return self.built()
        except Absent as missing:
            pytest.skip(str(missing))


def fill(model: nn.Module, seed: int) -> None:
    """Seeded non-zero values of useful size for every parameter and floating-point buffer."""
    generator = torch.Generator().manual_seed(seed)
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, value in named.items():
            if value.is_floating_point():
                value.copy_(_scaled(name, torch.randn(value.shape, generator=generator)))


def _scaled(name: str, noise: Tensor) -> Tensor:
    if noise.dim() <= 1:
        return 1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.1 * noise
    fan_in = noise.shape[-1] if noise.dim() == 3 else math.prod(noise.shape[1:])
    gain = 2.0 if name.endswith("gate.weight") else 1.0  # routers: some experts clearly preferred
    return gain * noise / math.sqrt(fan_in)


def falling(
    sample: Tensor, times: Sequence[Tensor], fixed: Call, *, sample_name: str, time_name: str
) -> list[Call]:
    """Calls of one generation: the sample drifts by 0.03 a step, everything in `fixed` stays."""
    generator = torch.Generator().manual_seed(7)
    calls = []
    for time in times:
        calls.append({sample_name: sample, time_name: time, **fixed})
        step = 0.03 * torch.randn(sample.shape, generator=generator)
        sample = sample + step.to(sample.dtype)
    return calls
