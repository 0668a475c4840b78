"""Self-attention as models write it: name -> (function of x [B, N, D], the op at its core)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graph.pushing import EACH, TOKENS, WIDTH, Pushed, push, tensor, tokens
from graph.row_functions import BIAS, MODULATION, POSITIONS

aten = torch.ops.aten
HEADS, HEAD = 2, 4
MASK = tensor(TOKENS, TOKENS, seed=5) > -0.5
BIG = [tensor(WIDTH, 3 * WIDTH, seed=6).t(), tensor(WIDTH, WIDTH, seed=7)]
ANGLE = tensor(TOKENS, HEAD // 2, seed=8)
OTHERS = [tensor(2, HEADS, 5, HEAD, seed=s) for s in (9, 10)]
BIASES = tensor(1, HEADS, TOKENS, TOKENS, seed=11)
COS, SIN = ANGLE.repeat(1, 2).cos(), ANGLE.repeat(1, 2).sin()
TURN = torch.polar(torch.ones_like(ANGLE), ANGLE)


def heads(x: Tensor, groups: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, N, d], k and v [B, groups, N, d]."""
    b, n, _ = x.shape
    sizes = [WIDTH, groups * HEAD, groups * HEAD]
    parts = F.linear(x, BIG[0])[..., : sum(sizes)].split(sizes, -1)
    q, k, v = (p.view(b, n, -1, HEAD).transpose(1, 2) for p in parts)
    return q, k, v


def merge(out: Tensor) -> Tensor:
    return F.linear(out.transpose(1, 2).flatten(2), BIG[1])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def sdpa(x: Tensor, **kwargs: Any) -> Tensor:
    return merge(F.scaled_dot_product_attention(*heads(x), **kwargs))


def packed(x: Tensor) -> Tensor:
    qkv = F.linear(x, BIG[0]).reshape(*x.shape[:2], 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    return merge(F.scaled_dot_product_attention(q, k, v))


def indexed(x: Tensor) -> Tensor:
    qkv = F.linear(x, BIG[0]).chunk(3, dim=-1)
    q, k, v = (p.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for p in qkv)
    return merge(F.scaled_dot_product_attention(q, k, v, scale=0.3))


def grouped(x: Tensor) -> Tensor:
    return merge(F.scaled_dot_product_attention(*heads(x, 1), enable_gqa=True))


def repeated(x: Tensor) -> Tensor:
    q, k, v = heads(x, 1)
    k, v = (p.repeat_interleave(HEADS, dim=1) for p in (k, v))
    return merge(F.scaled_dot_product_attention(q, k, v))


def expanded(x: Tensor) -> Tensor:
    q, k, v = heads(x, 1)
    k, v = (p[:, :, None].expand(-1, -1, HEADS, -1, -1).flatten(1, 2) for p in (k, v))
    return merge(F.scaled_dot_product_attention(q, k, v))


def manual(x: Tensor) -> Tensor:
    q, k, v = heads(x)
    scores = (q * HEAD**-0.5) @ k.transpose(-2, -1)
    return merge(scores.float().softmax(-1).to(v.dtype) @ v)


def masked(x: Tensor) -> Tensor:
    q, k, v = heads(x)
    scores = (q @ k.mT).masked_fill(~MASK, float("-inf")) + MODULATION[:, :6].view(2, 1, 1, 6)
    return merge(scores.softmax(-1) @ v)


def triangular(x: Tensor) -> Tensor:
    """Causal by a mask: positions are gathered with the rows, so rows can be computed alone."""
    q, k, v = heads(x)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    return merge((q @ k.mT).masked_fill(~causal, -1e9).softmax(-1) @ v)


def merged_heads(x: Tensor, bias: bool = False) -> Tensor:
    """Attention on [B * H, N, d] with bmm."""
    b, n, _ = x.shape
    q, k, v = (p.reshape(b * HEADS, n, HEAD) for p in heads(x))
    scores = torch.bmm(q, k.transpose(1, 2))
    if bias:  # positions [1, N, M] meet samples and heads in one dim
        scores = scores + POSITIONS[None, :, :6]
    out = torch.bmm(scores.softmax(-1), v)
    return merge(out.view(b, HEADS, n, HEAD))


def scaled_in_place(x: Tensor) -> Tensor:
    """baddbmm with beta = 0, as older libraries write scores."""
    b, n, _ = x.shape
    q, k, v = (p.reshape(b * HEADS, n, HEAD) for p in heads(x))
    empty = torch.zeros(b * HEADS, n, n, dtype=x.dtype)
    scores = torch.baddbmm(empty, q, k.mT, beta=0, alpha=0.5)
    return merge(torch.bmm(scores.softmax(-1), v).view(b, HEADS, n, HEAD))


def by_einsum(x: Tensor) -> Tensor:
    q, k, v = heads(x)
    weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
    return merge(torch.einsum("bhij,bhjd->bhid", weights, v))


def by_einsum_in_order(x: Tensor) -> Tensor:
    """Heads behind tokens, and an ellipsis."""
    q, k, v = (p.transpose(1, 2) for p in heads(x))
    weights = torch.einsum("b q h d, b k h d -> b h q k", q, k).softmax(-1)
    return merge(torch.einsum("...qk,...kd->...qd", weights, v.transpose(1, 2)))


def rope(x: Tensor, lead: int) -> Tensor:
    """Tables [N, d], [1, N, d] or [1, 1, N, d]."""
    q, k, v = heads(x)
    cos, sin = (t.view(*[1] * lead, TOKENS, HEAD) for t in (COS, SIN))
    return merge(F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v))


def rope_by_ids(x: Tensor) -> Tensor:
    """Tables looked up by position ids [B, N]."""
    ids = torch.stack([torch.arange(TOKENS), torch.arange(TOKENS).flip(0)])
    q, k, v = heads(x)
    cos, sin = COS[ids].unsqueeze(1), F.embedding(ids, SIN).unsqueeze(1)
    return merge(F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v))


def complex_rope(x: Tensor) -> Tensor:
    def turn(t: Tensor) -> Tensor:
        pairs = torch.view_as_complex(t.reshape(*t.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * TURN[None, None]).flatten(3).type_as(t)

    q, k, v = heads(x)
    return merge(F.scaled_dot_product_attention(turn(q), turn(k), v))


def qk_norm(x: Tensor) -> Tensor:
    q, k, v = heads(x)
    q, k = (F.rms_norm(t, (HEAD,), BIAS[:HEAD]) for t in (q, k))
    return merge(F.scaled_dot_product_attention(q, F.normalize(k, dim=-1), v))


def modulated(x: Tensor) -> Tensor:
    shift, scale, gate = F.linear(F.silu(MODULATION), BIG[0]).unsqueeze(1).chunk(3, dim=-1)
    inner = F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift
    return x + POSITIONS[None] + gate * sdpa(inner)


def cross(x: Tensor) -> Tensor:
    """Keys and values of other tokens."""
    q, _, _ = heads(x)
    return merge(F.scaled_dot_product_attention(q, OTHERS[0], OTHERS[1]))


def learned_queries(x: Tensor) -> Tensor:
    """Queries that are positions, the same for every sample."""
    _, k, v = heads(x)
    q = POSITIONS.view(1, TOKENS, HEADS, HEAD).transpose(1, 2)
    return merge(F.scaled_dot_product_attention(q.expand(2, -1, -1, -1), k, v))


def along_frames(x: Tensor) -> Tensor:
    """Attention within a token, over another axis: keys and values are rows as well."""
    q = x.reshape(12, 1, 4, 2)
    return F.scaled_dot_product_attention(q, F.silu(q), q * 2).reshape(2, 6, 8)


SDPA = aten.scaled_dot_product_attention.default
ATTENTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Any]] = {
    "sdpa": (sdpa, SDPA),
    "mask [N, N]": (lambda x: sdpa(x, attn_mask=MASK), SDPA),
    "mask [B, 1, N, N]": (lambda x: sdpa(x, attn_mask=(MASK & MASK).expand(2, 1, 6, 6)), SDPA),
    "mask [B, 1, 1, N]": (lambda x: sdpa(x, attn_mask=MODULATION[:, None, None, :6] > -1), SDPA),
    "bias [1, H, N, N]": (lambda x: sdpa(x, attn_mask=BIASES), SDPA),
    "packed": (packed, SDPA),
    "chunked": (indexed, SDPA),
    "grouped heads": (grouped, SDPA),
    "repeated heads": (repeated, SDPA),
    "expanded heads": (expanded, SDPA),
    "manual": (manual, aten.softmax.int),
    "manual, masked": (masked, aten.softmax.int),
    "manual, causal mask": (triangular, aten.softmax.int),
    "merged heads": (lambda x: merged_heads(x), aten.bmm.default),
    "merged heads with bias": (lambda x: merged_heads(x, bias=True), aten.bmm.default),
    "baddbmm": (scaled_in_place, aten.baddbmm.default),
    "einsum": (by_einsum, aten.einsum.default),
    "einsum, tokens first": (by_einsum_in_order, aten.einsum.default),
    "rope [N, d]": (lambda x: rope(x, 0), SDPA),
    "rope [1, N, d]": (lambda x: rope(x, 1), SDPA),
    "rope [1, 1, N, d]": (lambda x: rope(x, 2), SDPA),
    "rope by ids": (rope_by_ids, SDPA),
    "complex rope": (complex_rope, SDPA),
    "qk norm": (qk_norm, SDPA),
    "modulated block": (modulated, SDPA),
    "cross": (cross, SDPA),
    "learned queries": (learned_queries, SDPA),
}


@cache
def pushed_attention(name: str) -> Pushed:
    return push(ATTENTIONS[name][0], tokens(), selection=EACH, tolerance=1e-6)
