"""Self-attention in four spellings, each split into the steps the reference needs.

`heads(x [B, N, D]) -> q [B, H, N, d], k, v [B, G, N, d]` (G heads of keys, H / G queries each),
then `attend(q, k, v) -> [B, n, D]` for any number of query rows, then the output projection.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idioms.config import IdiomConfig
from idioms.precision import at_least_float32


class SdpaAttention(nn.Module):
    """One fused projection, fused attention."""

    def __init__(self, config: IdiomConfig) -> None:
        super().__init__()
        self.num_heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(*self.heads(x)))


class ManualAttention(SdpaAttention):
    """One fused projection, products and a float32 softmax written out."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = at_least_float32(scores).softmax(dim=-1).to(v.dtype)
        return (weights @ v).transpose(1, 2).flatten(2)


class EinsumAttention(SdpaAttention):
    """One fused projection, the products by equations; the heads come out behind the tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(dim=-1), v).flatten(2)


class RopeAttention(nn.Module):
    """Separate projections, normalised queries and keys, rotary positions, grouped heads."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: IdiomConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.repeats = 2 if config.heads % 2 == 0 else 1
        kv_dim = config.dim // self.repeats
        self.to_q = nn.Linear(config.dim, config.dim, bias=False)
        self.to_k = nn.Linear(config.dim, kv_dim, bias=False)
        self.to_v = nn.Linear(config.dim, kv_dim, bias=False)
        self.norm_q = nn.RMSNorm(config.head_dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(config.head_dim, eps=1e-6)
        self.to_out = nn.Linear(config.dim, config.dim)
        half = config.head_dim // 2
        angle = torch.arange(config.tokens)[:, None] / 100.0 ** (torch.arange(half) / half)
        self.register_buffer("cos", angle.repeat(1, 2).cos(), persistent=False)
        self.register_buffer("sin", angle.repeat(1, 2).sin(), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding of `x [B, N, H, d]` by its position along dim 1."""
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return x * self.cos[None, :, None, :] + turned * self.sin[None, :, None, :]

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        q = self.rotate(self.norm_q(self.to_q(x).view(b, n, -1, self.head_dim)))
        k = self.rotate(self.norm_k(self.to_k(x).view(b, n, -1, self.head_dim)))
        v = self.to_v(x).view(b, n, -1, self.head_dim)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k.repeat_interleave(self.repeats, dim=1)
        v = v.repeat_interleave(self.repeats, dim=1)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def proj(self, rows: Tensor) -> Tensor:
        return self.to_out(rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(*self.heads(x)))


ATTENTIONS: dict[str, type[SdpaAttention] | type[RopeAttention]] = {
    "sdpa": SdpaAttention,
    "manual": ManualAttention,
    "einsum": EinsumAttention,
    "rope": RopeAttention,
}
