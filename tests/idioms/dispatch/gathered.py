"""Idiom I8: stacked weights gathered per branch, batched matrix-vector products."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from idioms.config import IdiomConfig
from idioms.dispatch.base import MoELayer
from idioms.experts import StackedBank


class GatheredExperts(StackedBank):
    def forward(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """rows [T, D], ids and weights [T, K] -> [T, D]."""
        tokens, k = ids.shape
        flat_ids = ids.reshape(-1)
        token_of = torch.arange(tokens, device=rows.device).unsqueeze(1).expand(-1, k).reshape(-1)
        hidden = torch.bmm(self.w_in[flat_ids], rows[token_of].unsqueeze(-1)).squeeze(-1)
        if not self.gated:
            hidden = hidden + self.b_in[flat_ids]
        out = torch.bmm(self.w_out[flat_ids], self.activate(hidden).unsqueeze(-1)).squeeze(-1)
        if not self.gated:
            out = out + self.b_out[flat_ids]
        out = out * weights.reshape(-1, 1)
        return out.view(tokens, k, -1).sum(dim=1).to(rows.dtype)


class GatheredMoE(MoELayer):
    def make_experts(self, config: IdiomConfig) -> nn.Module:
        return GatheredExperts(config)

    def one_expert(self, expert: int, rows: Tensor) -> Tensor:
        bank = self.experts
        assert isinstance(bank, StackedBank)
        return bank.one(expert, rows)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        flat = x.view(b * n, d)
        weights, ids = self.router(flat)
        y = self.experts(flat, ids, weights)
        if self.shared is not None:
            y = y + self.shared(flat)
        return y.view(b, n, d)
