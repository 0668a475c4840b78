"""Idiom I9: branches sorted by expert, one grouped matrix product over stacked weights.

On CPU with torch 2.13 `grouped_mm` compiles in bfloat16 only; eager takes float32 too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from idioms.config import IdiomConfig
from idioms.dispatch.gathered import GatheredMoE
from idioms.experts import StackedBank


class GroupedExperts(StackedBank):
    def forward(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """rows [T, D], ids and weights [T, K] -> [T, D]."""
        tokens, k = ids.shape
        flat_ids = ids.reshape(-1)
        order = torch.argsort(flat_ids)
        inverse = torch.argsort(order)
        sorted_ids = flat_ids[order]
        experts = self.w_in.shape[0]
        counts = torch.histc(sorted_ids.float(), bins=experts, min=0, max=experts - 1)
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)

        hidden = F.grouped_mm(rows[order // k], self.w_in.transpose(-2, -1), offs=ends)
        if not self.gated:
            hidden = hidden + self.b_in[sorted_ids]
        out = F.grouped_mm(self.activate(hidden), self.w_out.transpose(-2, -1), offs=ends)
        if not self.gated:
            out = out + self.b_out[sorted_ids]

        out = out * weights.reshape(-1)[order].unsqueeze(-1)
        return out[inverse].view(tokens, k, -1).sum(dim=1).to(rows.dtype)


class GroupedMoE(GatheredMoE):
    def make_experts(self, config: IdiomConfig) -> torch.nn.Module:
        return GroupedExperts(config)
