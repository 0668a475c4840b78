"""Idiom I7: experts choose from the tokens of the whole batch, as many as a predictor says.

One sample's routing depends on its batch mates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idioms.config import IdiomConfig
from idioms.dispatch.base import MoELayer


class CapacityPredictor(nn.Module):
    """How likely each expert wants each row: [T, D] -> logits [T, E]."""

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, dim)
        self.down = nn.Linear(dim, experts)

    def forward(self, rows: Tensor) -> Tensor:
        return self.down(F.silu(self.up(rows)))


class BatchPoolMoE(MoELayer):
    threshold: Tensor

    def __init__(self, config: IdiomConfig) -> None:
        super().__init__(config)
        self.predictor = CapacityPredictor(config.dim, config.num_experts)
        self.register_buffer("threshold", torch.empty(config.num_experts))

    def picks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which expert has which token, and its weight, [T, E] each; for the reference."""
        flat = x.flatten(0, 1)
        wanted = self.predictor(flat).sigmoid() > self.threshold + 0.5
        scores = self.router.logits(flat).softmax(-1)
        chosen = torch.zeros_like(wanted)
        for number, count in enumerate(wanted.sum(0).tolist()):
            chosen[scores[:, number].topk(count).indices, number] = True
        return chosen, torch.where(chosen, scores, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        wanted = self.predictor(flat.detach()).sigmoid()
        scores = self.router.logits(flat).softmax(-1).t()  # [E, T]
        y = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            count = torch.where(wanted[:, number] > self.threshold[number] + 0.5, 1, 0).sum()
            gate, index = torch.topk(scores[number], k=count, dim=-1, sorted=False)
            y[index, :] += gate.unsqueeze(-1).to(y.dtype) * expert(flat[index, :])
        y = y.view_as(x)
        return y if self.shared is None else y + self.shared(x)
