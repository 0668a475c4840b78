"""Attention of few queries to all keys on a CPU, as a reuse step asks for it.

    q [B, H, L, D]   k [B, H, S, D]   v [B, H, S, W]   ->  softmax(scale q k.T) v  [B, H, L, W]

A library copies keys and values into the order its products like, whatever the number of queries;
few_queries.cpp reads them where they lie, a panel of keys after the other turned around into the
nearest cache. No mask, no dropout, as many heads of keys as of queries. With AVX-512 only: with
AVX2 it took as long as torch.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import SymInt, Tensor

from . import native
from .native import NUMBER, POINTER

KEYS = 2048  # beyond, torch is as fast
SIGNATURE = (POINTER, POINTER, POINTER, POINTER, POINTER, ctypes.c_float, NUMBER)


def dtypes() -> frozenset[torch.dtype]:
    """Of the values the kernel is for, on this machine."""
    return native.dtypes() if native.capability() == "AVX512" else frozenset()


def suits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel is for values like these. Sizes may be symbols, but those of keys."""
    given = (query, key, value)
    if any(t.dim() != 4 or t.dtype not in dtypes() or not t.is_cpu for t in given):
        return False
    if any(t.dtype != query.dtype or t.stride(3) != 1 for t in given):
        return False
    batch, heads, keys, width = key.shape
    if any(isinstance(n, SymInt) for n in (*key.shape, *value.shape)):
        return False
    if not 0 < keys <= KEYS:
        return False
    apart = (width, query.stride(2), key.stride(2))
    unit = 4 // key.element_size()  # states are read 32 bits at a time
    if any(isinstance(n, SymInt) or n % unit for n in apart):
        return False
    if width == 0 or (batch, heads, width) != (*query.shape[:2], query.shape[3]):
        return False
    return value.shape[:3] == key.shape[:3]


def pays(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **settings: Any) -> bool:
    """Whether arguments of `scaled_dot_product_attention` are the kernel's: selected queries, and
    nothing beyond a scale."""
    others = (*rest, *(v for name, v in settings.items() if name != "scale"))
    plain = not any(isinstance(v, Tensor) or v for v in others)
    return plain and suits(query, key, value) and isinstance(query.shape[2], SymInt)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor | None:
    """[B, H, L, W], in memory [B, L, H, W]; None for what the kernel is not for."""
    if not suits(query, key, value):
        return None
    kernel = native.kernel("few_queries", query.dtype, SIGNATURE)
    if kernel is None:
        return None
    (batch, heads, queries, width), keys = query.shape, key.shape[2]
    out = query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)
    strides = [n for t in (query, key, value, out) for n in t.stride()[:3]]
    sizes = (NUMBER * 18)(batch, heads, queries, keys, width, value.shape[3], *strides)
    scale = width**-0.5 if scale is None else scale
    addresses = [t.data_ptr() for t in (query, key, value, out)]
    kernel(*addresses, sizes, scale, torch.get_num_threads())
    return out
