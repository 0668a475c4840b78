"""What every mixture-of-experts layer here shares."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from idioms.config import IdiomConfig
from idioms.experts import EXPERTS, shared_experts
from idioms.routers import ROUTERS


class MoELayer(nn.Module):
    """Router, experts and shared experts; the subclasses write the dispatch.

    takes_labels: `forward(x, labels [B])` instead of `forward(x)`.
    """

    takes_labels = False

    def __init__(self, config: IdiomConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.num_experts = config.num_experts
        self.router = ROUTERS[config.router](config)
        self.experts = self.make_experts(config)
        self.shared = shared_experts(config)

    def make_experts(self, config: IdiomConfig) -> nn.Module:
        make = EXPERTS[config.expert]
        return nn.ModuleList([make(config.dim, config.hidden) for _ in range(config.num_experts)])

    def route(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids [T, K], no expert twice in a row of ids; for the reference."""
        return self.router(rows)

    def one_expert(self, expert: int, rows: Tensor) -> Tensor:
        """Expert number `expert` on all of `rows [T, D]`; for the reference."""
        bank = self.experts
        assert isinstance(bank, nn.ModuleList)
        return bank[expert](rows)

    def shared_rows(self, rows: Tensor) -> Tensor:
        """Sum of the shared experts on `rows [T, D]`, zeros without any; for the reference."""
        return torch.zeros_like(rows) if self.shared is None else self.shared(rows)
