"""A diffusion transformer that predicts noise: one modulation for all layers, masked experts.

    eps = model(sample [B, 1, 32, 32], timestep [B] in 0 .. 999, labels [B])
    eps = sqrt(1 - a) * sample + sqrt(a) * network(...),  a = alpha_bar[timestep]

The first term is the noise the sample shows by itself; a small network need not copy it through
its layers (preconditioning in the sense of Karras et al. 2022, arXiv:2206.00364).
One linear layer turns the conditioning into six modulation vectors that all blocks share; each
block adds a small table of its own (adaLN-single, PixArt-alpha, arXiv:2310.00426 section 2.3).
Every token is repeated once per chosen expert, and each expert serves the rows under its mask:

    tokens [T, D] -> softmax -> top-2, gates made to sum to 1 -> rows [T * 2, D]
    out[ids == e] = expert_e(rows[ids == e]) for every e -> [T, 2, D] -> weighted sum
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from .schedule import alpha_bars


@dataclass(frozen=True)
class Config:
    """Sizes of the network; timesteps run from 0 (image) to `num_timesteps` - 1 (noise)."""

    image_size: int = 32
    channels: int = 1
    patch: int = 4
    dim: int = 128
    depth: int = 5
    heads: int = 4
    num_classes: int = 10
    num_timesteps: int = 1000
    num_experts: int = 8
    top_k: int = 2
    expert_hidden: int = 192
    shared_hidden: int = 192
    label_dropout: float = 0.1


def sincos_2d(dim: int, side: int) -> Tensor:
    """Where the learned position table starts, [1, side * side, dim]: rows, then columns."""
    freq = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    angle = torch.outer(torch.arange(side, dtype=torch.float32), freq)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)  # [side, dim / 2]
    both = [line.repeat_interleave(side, dim=0), line.repeat(side, 1)]
    return torch.cat(both, dim=1).unsqueeze(0)


class ConditionEmbedder(nn.Module):
    """Timestep and class, [B] and [B] -> one vector per image, [B, D]."""

    def __init__(self, cfg: Config, freq_dim: int = 128) -> None:
        super().__init__()
        self.half = freq_dim // 2
        self.linear_in = nn.Linear(freq_dim, cfg.dim)
        self.linear_out = nn.Linear(cfg.dim, cfg.dim)
        self.label = nn.Embedding(cfg.num_classes + 1, cfg.dim)

    def forward(self, timestep: Tensor, labels: Tensor) -> Tensor:
        steps = torch.arange(self.half, device=timestep.device, dtype=torch.float32)
        angle = timestep.float()[:, None] * torch.exp(-math.log(10000.0) * steps / self.half)
        wave = torch.cat([angle.sin(), angle.cos()], dim=-1)
        return self.linear_out(F.silu(self.linear_in(wave))) + self.label(labels)


class Attention(nn.Module):
    """Self-attention with normalised queries and keys, [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.norm_q = nn.RMSNorm(dim // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(dim // heads, eps=1e-6)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        by_head = (b, n, self.heads, d // self.heads)
        q = self.norm_q(self.to_q(x).view(by_head)).transpose(1, 2)
        k = self.norm_k(self.to_k(x).view(by_head)).transpose(1, 2)
        v = self.to_v(x).view(by_head).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).reshape(b, n, d))


class FeedForward(nn.Module):
    """SiLU MLP on rows, [R, D] -> [R, D]; an expert."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class SoftmaxRouter(nn.Module):
    """The most probable `top_k` experts of a token, gates made to sum to 1."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.top_k = cfg.top_k
        self.linear = nn.Linear(cfg.dim, cfg.num_experts, bias=False)

    def probabilities(self, rows: Tensor) -> Tensor:
        """rows [T, D] -> [T, E] float32."""
        return self.linear(rows).float().softmax(dim=-1)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows [T, D] -> gates [T, K] float32, expert ids [T, K] int64."""
        gates, ids = torch.topk(self.probabilities(rows), self.top_k, dim=-1, sorted=False)
        return gates / gates.sum(dim=-1, keepdim=True), ids


class SparseFeedForward(nn.Module):
    """Experts under boolean masks, and one shared expert for every token."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.router = SoftmaxRouter(cfg)
        self.experts = nn.ModuleList(
            [FeedForward(cfg.dim, cfg.expert_hidden) for _ in range(cfg.num_experts)]
        )
        self.shared = FeedForward(cfg.dim, cfg.shared_hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        tokens = x.reshape(-1, x.shape[-1])
        gates, ids = self.router(tokens)
        rows = tokens.repeat_interleave(ids.shape[1], dim=0)
        flat_ids = ids.view(-1)
        out = torch.empty_like(rows)
        for index, expert in enumerate(self.experts):
            mine = flat_ids == index
            out[mine] = expert(rows[mine])
        out = out.view(*ids.shape, -1)
        routed = (out * gates.to(out.dtype).unsqueeze(-1)).sum(dim=1)
        return (routed + self.shared(tokens)).view_as(x)


class Block(nn.Module):
    """Attention and experts; the shared modulation plus this block's own table."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(cfg.dim, cfg.heads)
        self.norm2 = nn.LayerNorm(cfg.dim, elementwise_affine=False, eps=1e-6)
        self.mlp = SparseFeedForward(cfg)
        self.table = nn.Parameter(torch.zeros(6, cfg.dim))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [B, N, D], modulation [B, 6, D] -> [B, N, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.table + modulation).chunk(6, dim=1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class EpsilonDiT(nn.Module):
    """Noise predictor; label `num_classes` means no class."""

    alpha_bars: Tensor  # [num_timesteps]

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.patchify = nn.Conv2d(cfg.channels, cfg.dim, cfg.patch, stride=cfg.patch)
        self.pos = nn.Parameter(sincos_2d(cfg.dim, cfg.image_size // cfg.patch))
        self.register_buffer("alpha_bars", alpha_bars(cfg.num_timesteps).float(), persistent=False)
        self.condition = ConditionEmbedder(cfg)
        self.modulation = nn.Linear(cfg.dim, 6 * cfg.dim)
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.depth)])
        self.norm = nn.LayerNorm(cfg.dim, elementwise_affine=False, eps=1e-6)
        self.head_modulation = nn.Linear(cfg.dim, 2 * cfg.dim)
        self.head = nn.Linear(cfg.dim, cfg.channels * cfg.patch**2)
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier for linear layers; modulation and head start at zero, as in adaLN-Zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, SoftmaxRouter):
                nn.init.normal_(module.linear.weight, std=0.02)
        for layer in (self.modulation, self.head_modulation, self.head):
            nn.init.zeros_(layer.weight)
        nn.init.normal_(self.condition.label.weight, std=0.02)

    def forward(self, sample: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """sample [B, C, H, W], timestep [B] integer or float, labels [B] int64 -> [B, C, H, W]."""
        c = F.silu(self.condition(timestep, labels))
        modulation = self.modulation(c).view(len(c), 6, -1)
        h = self.patchify(sample).flatten(2).transpose(1, 2) + self.pos
        for block in self.blocks:
            h = block(h, modulation)
        shift, scale = self.head_modulation(c).unsqueeze(1).chunk(2, dim=-1)
        values = self.head(self.norm(h) * (1 + scale) + shift)  # [B, N, C * P * P]
        side = self.cfg.image_size // self.cfg.patch
        grid = values.transpose(1, 2).unflatten(2, (side, side))
        alpha = self.alpha_bars[timestep.long()].view(-1, 1, 1, 1)
        return (1 - alpha).sqrt() * sample + alpha.sqrt() * F.pixel_shuffle(grid, self.cfg.patch)


def load_model(folder: Path | str) -> EpsilonDiT:
    """The trained network in `folder` (config.json, weights.safetensors), float32, eval mode."""
    folder = Path(folder)
    model = EpsilonDiT(Config(**json.loads((folder / "config.json").read_text())))
    weights = load_file(folder / "weights.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval()
