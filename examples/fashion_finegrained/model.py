"""A diffusion transformer with fine-grained experts: many small ones, four a token, sigmoid gates.

Rectified flow: x_t = (1 - t) * x0 + t * noise, the network predicts v = noise - x0, t in [0, 1];
sampling goes from t = 1 (noise) to t = 0 (image). The experts are dispatched over a hit list: one
pass of Python over the experts that received a token, whose results are added in place.

    tokens [T, D] -> sigmoid scores [T, E] -> top-4 of (score + balance bias)
    weights = scores of the four / their sum * route_scale
    for every expert that was hit:  out[rows] += weight[rows] * expert(tokens[rows])
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """Sizes of the network; `route_scale` multiplies the gates after they were made to sum to 1."""

    image_size: int = 32
    channels: int = 1
    patch: int = 4
    dim: int = 128
    depth: int = 6
    heads: int = 4
    num_classes: int = 10
    num_experts: int = 16
    top_k: int = 4
    expert_hidden: int = 64
    shared_hidden: int = 128
    route_scale: float = 2.5
    label_dropout: float = 0.1


def sincos_2d(dim: int, side: int) -> Tensor:
    """Fixed sine and cosine position table, [1, side * side, dim]: rows first, columns second."""
    freq = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    arg = torch.arange(side, dtype=torch.float32)[:, None] * freq[None]
    line = torch.cat([arg.sin(), arg.cos()], 1)  # [side, dim / 2]
    rows = line[:, None, :].expand(side, side, -1)
    cols = line[None, :, :].expand(side, side, -1)
    return torch.cat([rows, cols], -1).reshape(1, side * side, dim)


class TimestepEmbedder(nn.Module):
    """Sinusoids of 1000 * t through a two-layer MLP: t [B] in [0, 1] -> [B, D]."""

    def __init__(self, dim: int, freq_dim: int = 128) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.mlp = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        half = self.freq_dim // 2
        steps = torch.arange(half, device=t.device, dtype=torch.float32)
        freq = torch.exp(-math.log(10000.0) * steps / half)
        arg = (t.float() * 1000.0)[:, None] * freq[None]
        return self.mlp(torch.cat([arg.cos(), arg.sin()], -1))


class Attention(nn.Module):
    """Multi-head self-attention over all tokens of an image, [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class Expert(nn.Module):
    """SwiGLU MLP on rows, [R, D] -> [R, D]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)  # gate
        self.w2 = nn.Linear(hidden, dim, bias=False)  # down
        self.w3 = nn.Linear(dim, hidden, bias=False)  # up

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SigmoidRouter(nn.Module):
    """Chooses `top_k` experts per token; the balance bias takes part in the choice only.

    The bias is no parameter: training nudges it after each step, up for experts that got too few
    tokens and down for those that got too many, so no balance loss disturbs the gradients.
    """

    balance_bias: Tensor  # [E]

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.top_k, self.scale = cfg.top_k, cfg.route_scale
        self.weight = nn.Parameter(torch.empty(cfg.num_experts, cfg.dim))
        self.register_buffer("balance_bias", torch.zeros(cfg.num_experts))

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows [T, D] -> gates [T, K] float32 with sum `scale`, expert ids [T, K] int64."""
        scores = F.linear(rows.float(), self.weight.float()).sigmoid()
        ids = (scores + self.balance_bias).topk(self.top_k, dim=-1).indices
        gates = scores.gather(1, ids)
        return gates / (gates.sum(-1, keepdim=True) + 1e-9) * self.scale, ids


class MoE(nn.Module):
    """Fine-grained experts behind a sigmoid router, and one shared expert for every token."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.num_experts = cfg.num_experts
        self.router = SigmoidRouter(cfg)
        self.experts = nn.ModuleList(
            [Expert(cfg.dim, cfg.expert_hidden) for _ in range(cfg.num_experts)]
        )
        self.shared = Expert(cfg.dim, cfg.shared_hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        b, n, d = x.shape
        tokens = x.reshape(-1, d)
        gates, ids = self.router(tokens)
        out = torch.zeros_like(tokens)

        expert_mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)  # [E, K, T]
        hit_list = expert_mask.sum(dim=(1, 2)).nonzero()
        for hit in hit_list:
            expert = self.experts[int(hit)]
            slot, row = torch.where(expert_mask[int(hit)])
            result = expert(tokens[row]) * gates[row, slot, None].to(tokens.dtype)
            out.index_add_(0, row, result)

        out = out + self.shared(tokens)
        return out.view(b, n, d)


class Block(nn.Module):
    """Attention and MoE, each modulated and gated by the conditioning (adaLN-Zero)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(cfg.dim, cfg.heads)
        self.norm2 = nn.LayerNorm(cfg.dim, elementwise_affine=False, eps=1e-6)
        self.moe = MoE(cfg)
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 6 * cfg.dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x [B, N, D], c [B, D] -> [B, N, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(c).unsqueeze(1).chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.moe(self.norm2(x) * (1 + scale2) + shift2)


class FineGrainedDiT(nn.Module):
    """Velocity network; `forward(x, t, y)` takes labels y, `num_classes` meaning no class."""

    pos: Tensor  # [1, N, D]

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        patch_values = cfg.patch * cfg.patch * cfg.channels
        self.embed = nn.Linear(patch_values, cfg.dim)
        side = cfg.image_size // cfg.patch
        self.register_buffer("pos", sincos_2d(cfg.dim, side), persistent=False)
        self.t_embed = TimestepEmbedder(cfg.dim)
        self.y_embed = nn.Embedding(cfg.num_classes + 1, cfg.dim)
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.depth)])
        self.norm = nn.LayerNorm(cfg.dim, elementwise_affine=False, eps=1e-6)
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 2 * cfg.dim))
        self.head = nn.Linear(cfg.dim, patch_values)
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier for linear layers; modulation and head start at zero (adaLN-Zero)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                zero = name == "head" or name.endswith("ada.1")
                nn.init.zeros_(module.weight) if zero else nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, SigmoidRouter):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.y_embed.weight, std=0.02)

    def patchify(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, C * P * P]."""
        b, c, h, w = x.shape
        p = self.cfg.patch
        x = x.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(b, -1, c * p * p)

    def unpatchify(self, x: Tensor) -> Tensor:
        """[B, N, C * P * P] -> [B, C, H, W]."""
        p, c = self.cfg.patch, self.cfg.channels
        side = self.cfg.image_size // p
        x = x.view(-1, side, side, c, p, p).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(-1, c, side * p, side * p)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x [B, C, H, W], t [B] in [0, 1], y [B] int64 -> velocity [B, C, H, W]."""
        c = self.t_embed(t) + self.y_embed(y)
        h = self.embed(self.patchify(x)) + self.pos
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.ada(c).unsqueeze(1).chunk(2, -1)
        return self.unpatchify(self.head(self.norm(h) * (1 + scale) + shift))


def load_model(folder: Path | str) -> FineGrainedDiT:
    """The trained network in `folder` (config.json, weights.safetensors), float32, eval mode."""
    folder = Path(folder)
    model = FineGrainedDiT(Config(**json.loads((folder / "config.json").read_text())))
    weights = load_file(folder / "weights.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval()
