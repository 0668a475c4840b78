"""Idiom I2: a one-hot mask, the list of experts that were hit, `where` and `index_add_`.

Over a list of expert modules, and over stacked weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idioms.config import IdiomConfig
from idioms.dispatch.base import MoELayer
from idioms.experts import EXPERTS, StackedBank


class HitListExperts(nn.ModuleList):
    """The experts, and the loop over those that some token chose."""

    def forward(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """rows [T, D], ids and weights [T, K] -> [T, D]."""
        total = torch.zeros_like(rows)
        mask = F.one_hot(ids, num_classes=len(self)).permute(2, 1, 0)  # [E, K, T]
        hits = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for hit in hits:
            expert = int(hit[0])
            slot, token = torch.where(mask[expert])
            out = self[expert](rows[token]) * weights[token, slot, None]
            total.index_add_(0, token, out.to(rows.dtype))
        return total


class HitListMoE(MoELayer):
    def make_experts(self, config: IdiomConfig) -> nn.Module:
        make = EXPERTS[config.expert]
        return HitListExperts([make(config.dim, config.hidden) for _ in range(config.num_experts)])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        weights, ids = self.router(flat)
        y = self.experts(flat, ids, weights).view_as(x)
        if self.shared is not None:
            y = self.shared(x) + y
        return y


class StackedHitList(StackedBank):
    """The same loop over slices of stacked weights."""

    def forward(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """rows [T, D], ids and weights [T, K] -> [T, D]."""
        total = torch.zeros_like(rows)
        mask = F.one_hot(ids, num_classes=self.w_in.shape[0]).permute(2, 1, 0)  # [E, K, T]
        for hit in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            expert = hit[0]
            slot, token = torch.where(mask[expert])
            out = self.one(expert, rows[token]) * weights[token, slot, None]
            total.index_add_(0, token, out.to(rows.dtype))
        return total


class StackedHitListMoE(HitListMoE):
    def make_experts(self, config: IdiomConfig) -> nn.Module:
        return StackedHitList(config)

    def one_expert(self, expert: int, rows: Tensor) -> Tensor:
        bank = self.experts
        assert isinstance(bank, StackedBank)
        return bank.one(expert, rows)
