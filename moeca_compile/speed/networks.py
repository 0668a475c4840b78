"""Denoisers to be measured: plain eager PyTorch, dispatch as published code writes it.

    Network(SIZES["small"])(x [B, C, H, W], t [B], y [B]) -> [B, C, H, W]

Two ways from the router to the experts: branches sorted, counts read on the host, a Python loop
over slices ("sorted"); a list of the experts that were hit, `where`, `index_add_` ("hit"). Weights
are random and none is zero: a silent branch of the network would make caching look exact.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS, SIDE, PATCH, CLASSES = 4, 32, 2, 1000


@dataclass(frozen=True)
class Size:
    """One configuration. gating: "softmax" (as it is) or "sigmoid" (renormalised, times `scale`).

    hidden, shared_hidden: width of a routed and of the shared expert. groups: of the sigmoid
    router's experts. every: one block in so many has experts, the others an MLP.
    """

    dim: int
    depth: int
    heads: int
    experts: int
    top_k: int
    hidden: int
    shared_hidden: int
    gating: str = "softmax"
    dispatch: str = "sorted"
    scale: float = 1.0
    groups: int = 1
    every: int = 1
    side: int = SIDE


def _softmax(dim: int, depth: int, heads: int) -> Size:
    """Eight experts top-2, four times as wide as the tokens, and two shared ones in one."""
    return Size(dim, depth, heads, 8, 2, 4 * dim, 2 * dim)


def _sigmoid(
    dim: int, depth: int, heads: int, experts: int, top_k: int, hidden: int, groups: int
) -> Size:
    """A shared expert as wide as a routed one, in every second block; weights sum to 2.5."""
    return Size(
        dim, depth, heads, experts, top_k, hidden, hidden, "sigmoid", "hit", 2.5, groups, 2
    )  # fmt: skip


SIZES: dict[str, Size] = {
    "small": _softmax(384, 12, 6),
    "base": _softmax(768, 12, 12),
    "xl": _softmax(1152, 28, 16),
    "sigmoid-16": _sigmoid(384, 10, 6, 16, 2, 768, 2),
    "sigmoid-48": _sigmoid(384, 12, 6, 48, 5, 128, 1),
    "sigmoid-16-large": _sigmoid(1024, 20, 16, 16, 2, 2048, 2),
    "sigmoid-48-large": _sigmoid(1024, 24, 16, 48, 5, 448, 1),
    "tiny": Size(32, 2, 2, 4, 2, 48, 48, side=8),
    "tiny-sigmoid": Size(32, 2, 2, 8, 2, 32, 32, "sigmoid", "hit", 2.5, 2, 1, 8),
}


class Expert(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        """[R, D] -> [R, D]."""
        return self.down(F.silu(self.gate(rows)) * self.up(rows))


class Router(nn.Module):
    """Token choice: ids and weights [T, K]."""

    correction: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(size.experts, size.dim))
        self.register_buffer("correction", torch.empty(size.experts))

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows: [T, D]."""
        size = self.size
        logits = F.linear(rows.float(), self.weight.float())
        if size.gating == "softmax":
            weights, ids = logits.softmax(-1).topk(size.top_k, -1, sorted=False)
            return ids, weights.to(rows.dtype)
        scores = logits.sigmoid()
        choice = self._within_groups(scores + self.correction.float())
        ids = choice.topk(size.top_k, -1, sorted=False).indices
        weights = scores.gather(1, ids)
        weights = size.scale * weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids, weights.to(rows.dtype)

    def _within_groups(self, choice: Tensor) -> Tensor:
        """The scores of experts outside the chosen groups become zero; here all groups are."""
        groups = self.size.groups
        grouped = choice.view(len(choice), groups, -1)
        best = grouped.topk(2, -1).values.sum(-1).topk(groups, -1, sorted=False).indices
        mask = torch.zeros(len(choice), groups, device=choice.device).scatter(1, best, 1.0)
        return (grouped * mask.unsqueeze(-1)).view_as(choice)


class Experts(nn.Module):
    """Router, routed experts and the shared one."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.router = Router(size)
        self.experts = nn.ModuleList(Expert(size.dim, size.hidden) for _ in range(size.experts))
        self.shared = Expert(size.dim, size.shared_hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        rows = x.reshape(-1, x.shape[-1])
        ids, weights = self.router(rows)
        dispatch = self.sorted_slices if self.size.dispatch == "sorted" else self.hit_list
        return dispatch(rows, ids, weights).view(x.shape) + self.shared(x)

    def sorted_slices(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Every expert on its slice of the sorted branches; their sizes are read on the host."""
        out, flat, gates = torch.zeros_like(rows), ids.view(-1), weights.reshape(-1, 1)
        order = flat.argsort()
        ends = flat.bincount(minlength=self.size.experts).cpu().numpy().cumsum(0)
        token, start = order // self.size.top_k, 0
        for expert, end in zip(self.experts, ends):
            if end > start:
                at = token[start:end]
                part = expert(rows[at]) * gates[order[start:end]]
                out.scatter_reduce_(0, at.view(-1, 1).expand_as(part), part, reduce="sum")
            start = end
        return out

    def hit_list(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The experts that were hit at all, one after another, on the rows that chose them."""
        out = torch.zeros_like(rows)
        hits = F.one_hot(ids, self.size.experts).permute(2, 1, 0)  # [E, K, T]
        for number in (hits.sum((-1, -2)) > 0).nonzero():
            slot, token = torch.where(hits[number].squeeze(0))
            part = self.experts[int(number)](rows[token]) * weights[token, slot, None]
            out.index_add_(0, token, part.to(out.dtype))
        return out


class Attention(nn.Module):
    """Self-attention over the tokens of a sample."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
    """Attention, then experts (or an MLP), both modulated by the conditioning."""

    def __init__(self, size: Size, routed: bool) -> None:
        super().__init__()
        dim = size.dim
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, size.heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
        self.mlp = Experts(size) if routed else mlp
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x: [B, N, D]; c: [B, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Network(nn.Module):
    """Patches, timestep and label in; one value per pixel out."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        dim, pixels = size.dim, PATCH * PATCH * CHANNELS
        self.size = size
        self.embed = nn.Linear(pixels, dim)
        self.pos = nn.Parameter(torch.empty(1, (size.side // PATCH) ** 2, dim))
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(CLASSES + 1, dim)  # the last one: no class
        self.blocks = nn.ModuleList(
            Block(size, i % size.every == size.every - 1) for i in range(size.depth)
        )
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.head = nn.Linear(dim, pixels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x: [B, C, H, W]; t: [B] in [0, 1]; y: [B] labels."""
        steps = torch.arange(128, device=t.device, dtype=torch.float32)
        waves = 1000 * t.float()[:, None] * torch.exp(-math.log(10000.0) / 128 * steps)
        times = torch.cat([waves.cos(), waves.sin()], -1).to(x.dtype)
        c = self.time(times) + self.label(y)
        h = self.embed(_patches(x)) + self.pos
        for block in self.blocks:
            h = block(h, c)
        scale, shift = self.modulation(c).unsqueeze(1).chunk(2, -1)
        return _pixels(self.head(self.norm(h) * (1 + scale) + shift), x.shape)


def _patches(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    cut = x.view(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * PATCH * PATCH)


def _pixels(rows: Tensor, shape: torch.Size) -> Tensor:
    b, c, h, w = shape
    cut = rows.view(b, h // PATCH, w // PATCH, c, PATCH, PATCH)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def build(size: Size, seed: int = 0, device: torch.device | str = "cpu") -> Network:
    """In eval mode without gradients, every weight seeded and of useful size; other devices draw
    other weights."""
    with torch.device("meta"):
        network = Network(size)
    network.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, value in (*network.named_parameters(), *network.named_buffers()):
            value.normal_(generator=generator).mul_(_gain(name, value))
    return network.eval().requires_grad_(False)


def with_shared_weights(model: nn.Module) -> nn.Module:
    """A copy with modules of its own, for another compilation, and the very same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _gain(name: str, value: Tensor) -> float:
    if value.dim() < 2:
        return 0.1
    if name in ("pos", "label.weight"):
        return 0.5
    return (2.0 if "router" in name else 1.0) / math.sqrt(value.shape[-1])


def call(size: Size, batch: int, seed: int = 1) -> tuple[Any, ...]:
    """Arguments of a first call: guidance as a doubled batch, half of it without a class.

    Raises ValueError for an odd batch.
    """
    if batch % 2:
        raise ValueError(f"batch: expected an even number (guidance doubles it), got {batch}")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch // 2, CHANNELS, size.side, size.side, generator=generator)
    y = torch.randint(0, CLASSES, (batch // 2,), generator=generator)
    return torch.cat([x, x]), torch.ones(batch), torch.cat([y, torch.full_like(y, CLASSES)])
