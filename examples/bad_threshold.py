"""A mistake to find: the owner of this sampler says that the images have been a little off lately.

moeca debug examples/bad_threshold.py:Sampler      (docs/debugging.md walks through it)
"""

from __future__ import annotations

from pathlib import Path

import torch
from fashion_ditmoe.model import load_model
from fashion_ditmoe.sampler import sample
from torch import Tensor


class Sampler:
    """Two images in eight steps. `options` is what its owner passes to torch.compile."""

    options = {"policy": "moeca", "interval": 4, "tau": 8.0}

    def __init__(self) -> None:
        self.model = load_model(Path(__file__).parent / "fashion_ditmoe")

    def generate(self) -> Tensor:
        """[2, 1, 32, 32] in [-1, 1]."""
        return sample(self.model, torch.arange(2), steps=8)
