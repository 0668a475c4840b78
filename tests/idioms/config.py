"""Sizes and choices of one tiny denoiser."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class IdiomConfig:
    """Everything `Denoiser` needs; see `idioms.make` for the meaning of the names."""

    idiom: str
    router: str
    expert: str
    top_k: int
    num_experts: int
    shared: int
    attention: str
    dim: int
    depth: int
    heads: int
    tokens: int
    hidden: int = 48
    channels: int = 3
    patch: int = 2
    num_classes: int = 10
    route_scale: float = 2.5
    capacity_factor: float = 3.0
    choice_capacity: float = 2.0

    def __post_init__(self) -> None:
        if math.isqrt(self.tokens) ** 2 != self.tokens:
            raise ValueError(f"tokens must be a square number, got {self.tokens}")
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim {self.dim} must be a multiple of 2 * heads ({self.heads})")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k {self.top_k} is not in [1, {self.num_experts}]")

    @property
    def side(self) -> int:
        """Image height and width in pixels."""
        return self.patch * math.isqrt(self.tokens)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads
