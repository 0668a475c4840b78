"""Token-choice routers: `router(rows [T, D]) -> (weights [T, K], ids [T, K] int64)`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idioms.config import IdiomConfig
from idioms.precision import at_least_float32


class Router(nn.Module):
    """A linear map to expert logits, in at least float32."""

    def __init__(self, config: IdiomConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.dim))

    def logits(self, rows: Tensor) -> Tensor:
        return F.linear(at_least_float32(rows), at_least_float32(self.weight))


class SoftmaxRouter(Router):
    """Plain softmax probabilities of the chosen experts; they do not sum to one."""

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.logits(rows).softmax(-1).topk(self.top_k, dim=-1)
        return weights, ids


class RenormalisedRouter(Router):
    """Softmax, then the chosen weights divided by their sum."""

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.logits(rows).softmax(-1).topk(self.top_k, dim=-1, sorted=False)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20), ids


class SigmoidRouter(Router):
    """Sigmoid scores; a bias only for the selection; unbiased weights, renormalised and scaled."""

    correction_bias: Tensor

    def __init__(self, config: IdiomConfig) -> None:
        super().__init__(config)
        self.scale = config.route_scale
        self.register_buffer("correction_bias", torch.empty(config.num_experts))

    def choice(self, scores: Tensor) -> Tensor:
        return scores + self.correction_bias

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.logits(rows).sigmoid()
        ids = torch.topk(self.choice(scores), self.top_k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scale, ids


class GroupedSigmoidRouter(SigmoidRouter):
    """The same, experts limited to the best half of the groups: three `topk` in one layer."""

    def __init__(self, config: IdiomConfig) -> None:
        super().__init__(config)
        self.groups = 2
        if config.num_experts % self.groups or config.num_experts // self.groups < config.top_k:
            raise ValueError("every group must hold at least top_k experts")

    def choice(self, scores: Tensor) -> Tensor:
        biased = scores + self.correction_bias
        grouped = biased.view(scores.shape[0], self.groups, -1)
        group_score = grouped.topk(min(2, grouped.shape[-1]), dim=-1)[0].sum(-1)
        best = torch.topk(group_score, self.groups // 2, dim=-1, sorted=False)[1]
        keep = torch.zeros_like(group_score).scatter(1, best, 1.0)
        return grouped.masked_fill(keep.unsqueeze(-1) == 0, -1.0).flatten(1)


class TopKSoftmaxRouter(Router):
    """Softmax over the chosen logits only."""

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        best, ids = torch.topk(self.logits(rows), self.top_k, dim=-1)
        return best.softmax(-1), ids


ROUTERS: dict[str, type[Router]] = {
    "softmax": SoftmaxRouter,
    "softmax_renorm": RenormalisedRouter,
    "sigmoid": SigmoidRouter,
    "sigmoid_grouped": GroupedSigmoidRouter,
    "topk_softmax": TopKSoftmaxRouter,
}
