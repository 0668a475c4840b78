"""Idiom "split": branches sorted by expert, `split(counts.tolist())`, sort undone; all inline."""

from __future__ import annotations

import torch
from torch import Tensor

from idioms.dispatch.base import MoELayer


class SplitMoE(MoELayer):
    """No dispatch method: the loop stands in `forward` between routing and weighting."""

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        flat = x.reshape(-1, shape[-1])
        weights, ids = self.router(flat)

        branch = ids.reshape(-1)
        order = branch.argsort()
        counts = torch.bincount(branch, minlength=self.num_experts)
        pieces = flat.index_select(0, order // self.top_k).split(counts.tolist())
        out = torch.cat([run(piece) for run, piece in zip(self.experts, pieces)])
        out = out.index_select(0, order.argsort()).view(-1, self.top_k, shape[-1])

        y = (out * weights.unsqueeze(-1).to(out.dtype)).sum(1)
        if self.shared is not None:
            y = y + self.shared(flat)
        return y.view(shape)
