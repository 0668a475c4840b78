"""The whole tiny denoiser: patches, conditioning, adaLN-Zero blocks, head."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idioms.attention import ATTENTIONS
from idioms.config import IdiomConfig
from idioms.dispatch import DISPATCHES


class TimeEmbedder(nn.Module):
    """Sine and cosine features of t [B], then two linear layers: [B, D].

    The frequencies stay small, so that float32 and float64 agree on the angle.
    """

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.empty(dim // 2))
        self.up = nn.Linear(dim, dim)
        self.down = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        angle = t[:, None].to(self.frequencies.dtype) * self.frequencies[None]
        return self.down(F.silu(self.up(torch.cat([angle.cos(), angle.sin()], dim=-1))))


class Block(nn.Module):
    """Attention and a mixture-of-experts, each modulated and gated by the conditioning vector."""

    def __init__(self, config: IdiomConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, elementwise_affine=False, eps=1e-6)
        self.attn = ATTENTIONS[config.attention](config)
        self.norm2 = nn.LayerNorm(config.dim, elementwise_affine=False, eps=1e-6)
        self.moe = DISPATCHES[config.idiom](config)
        self.modulation = nn.Linear(config.dim, 6 * config.dim)

    def modulate(self, c: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale, gate of attention, then of the experts, each [B, 1, D], from c [B, D]."""
        return self.modulation(F.silu(c)).unsqueeze(1).chunk(6, dim=-1)

    def forward(self, x: Tensor, c: Tensor, labels: Tensor | None = None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulate(c)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a)
        rows = self.norm2(x) * (1 + scale_m) + shift_m
        moe = self.moe(rows, labels) if self.moe.takes_labels else self.moe(rows)
        return x + gate_m * moe


class Denoiser(nn.Module):
    """x [B, C, H, W], t [B], y [B] -> [B, C, H, W]."""

    def __init__(self, config: IdiomConfig) -> None:
        super().__init__()
        self.config = config
        patch, dim = config.patch, config.dim
        self.patch_embed = nn.Conv2d(config.channels, dim, patch, stride=patch)
        self.pos = nn.Parameter(torch.empty(1, config.tokens, dim))
        self.t_embed = TimeEmbedder(dim)
        self.y_embed = nn.Embedding(config.num_classes + 1, dim)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, patch * patch * config.channels)

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Token stream [B, N, D] and conditioning vector [B, D]."""
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos
        return tokens, self.t_embed(t) + self.y_embed(y)

    def finish(self, h: Tensor, c: Tensor) -> Tensor:
        """Token stream [B, N, D] to image [B, C, H, W]."""
        shift, scale = self.modulation_out(F.silu(c)).unsqueeze(1).chunk(2, dim=-1)
        out = self.head(self.norm_out(h) * (1 + scale) + shift)
        side, patch = math.isqrt(self.config.tokens), self.config.patch
        out = out.view(-1, side, side, patch, patch, self.config.channels)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(
            -1, self.config.channels, side * patch, side * patch
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.embed(x, t, y)
        for block in self.blocks:
            h = block(h, c, y)
        return self.finish(h, c)
