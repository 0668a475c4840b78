"""Idiom I1: branches sorted by expert, slice ends read on the host, one slice per expert."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from idioms.config import IdiomConfig
from idioms.dispatch.base import MoELayer


class SliceLoopMoE(MoELayer):
    """The dispatch is a `no_grad` method that scatters the gated slices into a sum."""

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        shape = x.shape
        weights, ids = self.router(x.reshape(-1, shape[-1]))
        flat = x.view(-1, shape[-1])
        y = self.moe_infer(flat, ids.view(-1), weights.view(-1, 1).to(x.dtype)).view(*shape)
        if self.shared is not None:
            y = y + self.shared(residual)
        return y

    @torch.no_grad()
    def moe_infer(self, x: Tensor, branch_ids: Tensor, branch_weights: Tensor) -> Tensor:
        """x [T, D], branch_ids [T * K], branch_weights [T * K, 1] -> [T, D]."""
        total = torch.zeros_like(x)
        order = branch_ids.argsort()
        ends = branch_ids.bincount().cpu().numpy().cumsum(0)
        token_of = order // self.top_k
        for expert, end in enumerate(ends):
            start = 0 if expert == 0 else ends[expert - 1]
            if start == end:
                continue
            end = self.last_row(start, end, len(branch_ids))
            tokens = token_of[start:end]
            out = self.experts[expert](x[tokens])
            out.mul_(branch_weights[order[start:end]])
            index = tokens.view(-1, 1).repeat(1, x.shape[-1])
            total.scatter_reduce_(0, index, out, reduce="sum")
        return total

    def last_row(self, start: int, end: int, branches: int) -> int:
        """Where the slice of one expert ends; `branches` is T * K."""
        return end


class CapacitySliceMoE(SliceLoopMoE):
    """The same with a capacity: an expert drops the rows past its share times a factor."""

    def __init__(self, config: IdiomConfig) -> None:
        super().__init__(config)
        self.capacity_factor = config.capacity_factor

    def last_row(self, start: int, end: int, branches: int) -> int:
        return min(end, start + math.ceil(self.capacity_factor * branches / self.num_experts))
