"""Idioms I5 and I6: every expert chooses its tokens, a fixed number per sample.

A token may be chosen by no expert or by all of them, so there is no [T, K] table of routing ids.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idioms.config import IdiomConfig
from idioms.dispatch.base import MoELayer
from idioms.experts import StackedBank


class ExpertChoiceMoE(MoELayer):
    """Idiom I5: one-hot dispatch and combine by einsum."""

    def __init__(self, config: IdiomConfig) -> None:
        super().__init__(config)
        self.capacity = config.choice_capacity

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, N, D] -> gates and token numbers [B, E, C]."""
        scores = self.router.logits(x).softmax(-1).transpose(1, 2)
        count = max(1, math.ceil(self.capacity * x.shape[1] / self.num_experts))
        gates, tokens = scores.topk(count, dim=-1)
        return gates.to(x.dtype), tokens

    def picks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which expert has which token, and its weight, [T, E] each; for the reference."""
        gates, tokens = self.choose(x)
        none = x.new_zeros(x.shape[0], self.num_experts, x.shape[1])
        weights = none.scatter(2, tokens, gates).transpose(1, 2).flatten(0, 1)
        return none.bool().scatter(2, tokens, True).transpose(1, 2).flatten(0, 1), weights

    def forward(self, x: Tensor) -> Tensor:
        gates, tokens = self.choose(x)
        dispatch = F.one_hot(tokens, num_classes=x.shape[1]).to(x.dtype)  # [B, E, C, N]
        picked = torch.einsum("becn,bnd->becd", dispatch, x)
        out = torch.stack([run(picked[:, e]) for e, run in enumerate(self.experts)], dim=1)
        y = torch.einsum("becn,bec,becd->bnd", dispatch, gates, out)
        return y if self.shared is None else y + self.shared(x)


class IndexedChoiceMoE(ExpertChoiceMoE):
    """Idiom I6: row numbers in the flattened batch, gates renormalised per token, scatter_add."""

    def __init__(self, config: IdiomConfig) -> None:
        super().__init__(config)
        self.scale = config.route_scale

    def picks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        chosen, gates = super().picks(x)
        return chosen, gates / (gates.sum(1, keepdim=True) + 1e-12) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        gates, tokens = self.choose(x)
        first = torch.arange(b, device=x.device).view(b, 1, 1) * n
        rows = (first + tokens).transpose(0, 1).reshape(-1)  # expert by expert
        gates = gates.transpose(0, 1).reshape(-1).float()
        total = torch.zeros(b * n, device=x.device, dtype=gates.dtype).scatter_add_(0, rows, gates)
        gates = gates / (total[rows] + 1e-12) * self.scale
        flat = x.reshape(b * n, d)
        out = self.run_experts(flat[rows], b * tokens.shape[-1])
        out = (out.float() * gates[:, None]).to(x.dtype)
        start = torch.zeros_like(flat) if self.shared is None else self.shared(x).reshape(b * n, d)
        return start.scatter_add(0, rows.view(-1, 1).expand(-1, d), out).view(b, n, d)

    def run_experts(self, rows: Tensor, each: int) -> Tensor:
        """rows [E * each, D], expert by expert -> the same with every expert applied."""
        counts = torch.full((self.num_experts,), each, device=rows.device, dtype=torch.long)
        parts = rows.split(counts.tolist(), dim=0)
        return torch.cat([run(part) for run, part in zip(self.experts, parts)], dim=0)


class GroupedChoiceExperts(StackedBank):
    def forward(self, rows: Tensor, each: int) -> Tensor:
        counts = torch.full((self.w_in.shape[0],), each, device=rows.device, dtype=torch.long)
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
        hidden = F.grouped_mm(rows, self.w_in.transpose(-2, -1), offs=ends)
        return F.grouped_mm(self.activate(hidden), self.w_out.transpose(-2, -1), offs=ends)


class GroupedChoiceMoE(IndexedChoiceMoE):
    """Idiom I6 with stacked weights and grouped products; SwiGLU experts only."""

    def make_experts(self, config: IdiomConfig) -> nn.Module:
        return GroupedChoiceExperts(config)

    def one_expert(self, expert: int, rows: Tensor) -> Tensor:
        bank = self.experts
        assert isinstance(bank, StackedBank)
        return bank.one(expert, rows)

    def run_experts(self, rows: Tensor, each: int) -> Tensor:
        return self.experts(rows, each)
