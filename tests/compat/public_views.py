"""The reference's views of public DiTs: blocks `adaLN_modulation, norm1, attn, norm2, moe | mlp`.

Case(..., view=TokenChoiceView)      # DiT-MoE, DSMoE: reference.py
Case(..., view=ExpertChoiceView)     # EC-DiT, DiffMoE: reference_choice.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PublicBlockView:
    """One block; the routing is left to the subclasses."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.attn = block.attn
        self.moe = block.moe if hasattr(block, "moe") else block.mlp
        listed = self.moe.experts
        self.experts = listed.blocks if hasattr(listed, "blocks") else listed
        self.num_experts = len(self.experts)

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of attention, then of the experts, each [B, 1, D]."""
        return self.block.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)

    def attention_input(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)[:2]
        return self.block.norm1(x) * (1 + scale) + shift

    def heads(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn, (b, n, _) = self.attn, a.shape
        if hasattr(attn, "qkv"):
            split = attn.qkv(a).reshape(b, n, 3, attn.num_heads, -1)
            q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        else:  # grouped: fewer heads of keys and values
            made = [linear(a) for linear in (attn.q_proj, attn.k_proj, attn.v_proj)]
            q, k, v = (m.view(b, n, -1, attn.head_dim).transpose(1, 2) for m in made)
        rotary = getattr(attn, "rope_type", "none")
        if rotary == "1d":
            q, k = (_rotated(r, *attn.rope(x=q, seq_len=n)) for r in (q, k))
        elif rotary == "2d":
            cos_y, sin_y, cos_x, sin_x = attn.rope(x=q)
            q, k = (_rotated_twice(r, (cos_y, sin_y), (cos_x, sin_x)) for r in (q, k))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = k.shape[1] != q.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        return self.attn.proj(out.transpose(1, 2).flatten(2))

    def add_attention(self, x: Tensor, attn: Tensor, c: Tensor) -> Tensor:
        return x + self.modulation(c)[2] * attn

    def expert_input(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)[3:5]
        return (self.block.norm2(x) * (1 + scale) + shift).flatten(0, 1)

    def expert(self, index: int, rows: Tensor) -> Tensor:
        return self.experts[index](rows)

    def shared(self, rows: Tensor) -> Tensor:
        return self.moe.shared_experts(rows)

    def add_experts(self, x: Tensor, moe: Tensor, c: Tensor) -> Tensor:
        return x + self.modulation(c)[5] * moe.view_as(x)


class TokenChoiceBlockView(PublicBlockView):
    """Tokens pick experts: a softmax router, or the model's own method in float64."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.top_k = self.moe.gate.top_k if hasattr(self.moe.gate, "top_k") else self.moe.top_k

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(rows, self.moe.gate.weight)
        if hasattr(self.moe, "route_tokens_to_experts"):  # group-limited sigmoid
            ids, weights = self.moe.route_tokens_to_experts(logits)
        else:
            weights, ids = logits.softmax(-1).topk(self.top_k, dim=-1)
        return weights, ids


class ExpertChoiceBlockView(PublicBlockView):
    """Experts pick tokens: a fixed number of each sample, or of the batch as many as predicted."""

    def picks(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """chosen and weights [T, E], zero where not chosen: rows [B, N, D]."""
        scores = F.linear(rows, self.moe.gate_weight).softmax(-1)  # [B, N, E]
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        if hasattr(self.moe, "capacity_predictor"):
            wanted = self.moe.capacity_predictor(rows).sigmoid() > self.moe.expert_threshold
            flat, picked = scores.flatten(0, 1), chosen.flatten(0, 1)
            for e, count in enumerate(wanted.flatten(0, 1).sum(0).tolist()):
                picked[flat[:, e].topk(count).indices, e] = True
        else:
            count = int(rows.shape[1] / self.num_experts * self.moe.capacity)
            chosen.scatter_(1, scores.topk(count, dim=1).indices, True)
        return chosen.flatten(0, 1), (scores * chosen).flatten(0, 1)


class PublicModelView:
    """The whole denoiser; its output is the first of what forward returns."""

    def __init__(self, model: nn.Module, view: Callable[[nn.Module], PublicBlockView]) -> None:
        self.model = model
        self.blocks = [view(block) for block in model.blocks]

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        model, h = self.model, self.model.x_embedder(x)
        if getattr(model, "rope_type", "none") == "none":
            h = h + model.pos_embed
        time = model.t_embedder  # its angles are in float32 whatever the weights; here too
        angles = time.timestep_embedding(t, time.frequency_embedding_size)
        return h, time.mlp(angles.to(h.dtype)) + model.y_embedder(y, False)

    def finish(self, h: Tensor, c: Tensor) -> Tensor:
        return self.model.unpatchify(self.model.final_layer(h, c))


def token_choice_view(model: nn.Module) -> PublicModelView:
    """DiT-MoE, DSMoE."""
    return PublicModelView(model, TokenChoiceBlockView)


def expert_choice_view(model: nn.Module) -> PublicModelView:
    """EC-DiT, DiffMoE."""
    return PublicModelView(model, ExpertChoiceBlockView)


def _rotated(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on halves: rows [B, H, N, d]; cos, sin [N, d]."""
    first, second = rows.chunk(2, dim=-1)
    return rows * cos + torch.cat([-second, first], dim=-1) * sin


def _rotated_twice(
    rows: Tensor, vertical: tuple[Tensor, Tensor], horizontal: tuple[Tensor, Tensor]
) -> Tensor:
    first, second = rows.chunk(2, dim=-1)
    return torch.cat([_rotated(first, *vertical), _rotated(second, *horizontal)], dim=-1)
