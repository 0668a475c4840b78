"""Idiom I4: tokens of unlabelled samples go to an expert of their own; Python branches on masks.

The router compares labelled tokens with one prototype per expert. All slots of an unlabelled
token name the same expert, and the first carries the whole weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idioms.config import IdiomConfig
from idioms.dispatch.base import MoELayer


class PrototypeMoE(MoELayer):
    takes_labels = True

    def __init__(self, config: IdiomConfig) -> None:
        super().__init__(config)
        self.null_label = config.num_classes
        self.router = nn.Module()
        self.router.prototypes = nn.Parameter(torch.empty(config.num_experts - 1, config.dim))

    def scores(self, rows: Tensor) -> Tensor:
        """Cosine of rows [T, D] to the prototypes, as probabilities [T, E - 1]."""
        cosine = F.normalize(rows, dim=1) @ F.normalize(self.router.prototypes, dim=1).T
        return (8.0 * cosine).softmax(dim=1)

    def assign(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """rows [B, N, D], labels [B] -> weights and ids [T, K]."""
        b, n, d = rows.shape
        flat = rows.reshape(-1, d)
        unlabelled = labels.view(b, 1).expand(-1, n).reshape(-1) == self.null_label
        labelled = ~unlabelled
        weights = torch.zeros(b * n, self.top_k, device=rows.device, dtype=rows.dtype)
        ids = torch.zeros(b * n, self.top_k, device=rows.device, dtype=torch.long)
        if unlabelled.any():
            where = torch.where(unlabelled)[0]
            weights[where, 0] = 1.0
            ids[where] = self.num_experts - 1
        if labelled.any():
            where = torch.where(labelled)[0]
            best, chosen = self.scores(flat[where]).topk(self.top_k, dim=1)
            weights[where] = best.to(weights.dtype)
            ids[where] = chosen
        return weights, ids

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        b, n, d = x.shape
        weights, ids = self.assign(x, labels)
        flat = x.reshape(-1, d)
        total = torch.zeros_like(flat)
        for number in range(self.num_experts):
            tokens = torch.where((ids == number).any(dim=1))[0]
            if tokens.numel() > 0:
                gate = (weights[tokens] * (ids[tokens] == number)).sum(dim=1)
                total.index_add_(0, tokens, self.experts[number](flat[tokens]) * gate[:, None])
            else:
                nothing = torch.zeros(1, d, device=x.device, dtype=x.dtype)
                total[0] += self.experts[number](nothing)[0] * 0
        total = total.view(b, n, d)
        if self.shared is not None:
            total += self.shared(x)
        return total

    def route(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """An unlabelled token's further slots stand for experts 0, 1, .. with weight zero."""
        weights, ids = self.scores(rows).topk(self.top_k, dim=1)
        null = (labels == self.null_label).repeat_interleave(rows.shape[0] // len(labels))
        slot = torch.arange(self.top_k)
        spare = torch.where(slot == 0, self.num_experts - 1, slot - 1)
        weights = torch.where(null[:, None], (slot == 0).to(weights.dtype), weights)
        return weights, torch.where(null[:, None], spare, ids)
