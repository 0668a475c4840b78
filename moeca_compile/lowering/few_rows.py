"""Products of few rows on a CPU: weights are read where they lie, once.

    rows [R, I] sorted by group   weights: each [O, I], contiguous either way   ->  out [R, O]

A library for large matrices copies every weight into the order its kernel likes before it
multiplies, whatever the number of rows; with some tens of rows that is as much work as the product
(docs/speed.md has the figures). few_rows.cpp takes sums along I, for which rows and weights lie
right as they are, and asks for the next weights while it uses these. With AVX-512 it packs, too,
where it is worth it: 64 outputs at a time for many rows, or for weights that are stored [I, O] and
seen turned around. native.py says where.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import SymInt, Tensor

from . import native
from .native import NUMBER, POINTER

# Rows a group, from which on torch's products are as fast. With AVX-512 float32 is still ahead, 0.4
# to 0.5 of the time: MKL has no such code for AMD's processors.
MANY = {
    ("AVX2", torch.float32): 512,
    ("AVX512", torch.float32): 2048,
    ("AVX512", torch.bfloat16): 256,
}
FEW = 256  # rows of a linear, where their number is known: clearly faster up to there
WORK = 2**22  # multiplications of such a linear
WEIGHTS = 2**16  # weights of a linear of selected rows
NARROW = 16  # outputs, as of a router: up to there any number of rows is faster, in float32
SELECTED = 512  # rows that may well have been selected: the kernel has to be for as many
SIGNATURE = (
    *(POINTER, NUMBER),  # rows, elements from one to the next
    *(POINTER, NUMBER),  # ends, groups
    *(POINTER, NUMBER, POINTER),  # weights, elements from one row to the next, biases or none
    *(POINTER, NUMBER, NUMBER, NUMBER),  # out, inputs, outputs, threads
)


def suits(rows: Tensor) -> bool:
    """Whether the kernel is for values like these, as far as device and dtype tell."""
    return rows.is_cpu and rows.dtype in native.dtypes()


def pays(rows: Tensor, weight: Tensor, *_: Tensor | None) -> bool:
    """Whether a linear of `rows [..., I]` and `weight [O, I]` is worth an op of its own, which
    costs some ten calls of Python. Sizes may be symbols."""
    if not suits(rows) or rows.dim() < 2 or weight.stride(1) != 1:
        return False
    count, many = prod(rows.shape[:-1]), _many(rows)
    if isinstance(count, SymInt):
        return many >= SELECTED and weight.numel() >= WEIGHTS
    fits = count <= min(FEW, many) or _is_narrow(weight)
    return fits and count * weight.numel() >= WORK


def _is_narrow(weight: Tensor) -> bool:
    return weight.shape[0] <= NARROW and weight.dtype == torch.float32


def _many(rows: Tensor) -> int:
    return MANY[native.capability(), rows.dtype]


def products(
    rows: Tensor, ends: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], out: Tensor
) -> bool:
    """Write `rows[r] @ W_g.T + b_g` to `out[r]` for the rows of every group g; False: did nothing.

    rows: [R, I], those of group g end at `ends[g]`; weights: each [O, I]; biases: none, or each
    [O]; out: [R, O], contiguous; all of one dtype. Not for many rows a group, other strides.
    """
    if ends.dtype != torch.int64 or not ends.is_contiguous():
        return False
    return _run(rows, ends.data_ptr(), weights, biases, out)


def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """`rows @ weight.T + bias`, or None where `products` does nothing.

    rows: [..., I]; weight: [O, I]; bias: [O] or None. Returns [..., O].
    """
    flat = rows.flatten(end_dim=-2)
    out = flat.new_empty(flat.shape[0], weight.shape[0])
    ends, biases = (NUMBER * 1)(flat.shape[0]), () if bias is None else (bias,)
    if not _run(flat, ends, (weight,), biases, out):
        return None
    return out.view(*rows.shape[:-1], weight.shape[0])


def _run(
    rows: Tensor, ends: Any, weights: Sequence[Tensor], biases: Sequence[Tensor], out: Tensor
) -> bool:
    first = weights[0]
    if not suits(rows):
        return False
    if rows.shape[0] > _many(rows) * len(weights) and not _is_narrow(first):
        return False
    if not _lie_right(rows, weights, biases):
        return False
    turned = first.stride(1) != 1
    kernel = native.kernel("few_rows", rows.dtype, SIGNATURE, *(("TURNED",) if turned else ()))
    if kernel is None:
        return False
    kernel(
        *(rows.data_ptr(), rows.stride(0), ends, len(weights)),
        *(_addresses(weights), first.stride(int(turned)), _addresses(biases) if biases else None),
        *(out.data_ptr(), first.shape[1], first.shape[0], torch.get_num_threads()),
    )
    return True


def _lie_right(rows: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> bool:
    """What the kernel relies on, which takes addresses as they come."""
    shape, stride = weights[0].shape, weights[0].stride()
    if rows.stride(1) != 1 or not 0 < shape[1] == rows.shape[1]:
        return False
    if stride[1] != 1 and not (stride[0] == 1 and _takes_turned(rows)):
        return False
    if any(w.shape != shape or w.stride() != stride for w in weights):
        return False
    if any(b.shape != shape[:1] or b.stride(0) != 1 for b in biases):
        return False
    return all(t.is_cpu and t.dtype == rows.dtype for t in (*weights, *biases))


def _takes_turned(rows: Tensor) -> bool:
    """With AVX2 such a kernel took as long as MKL, and bfloat16 goes by pairs of inputs."""
    return native.capability() == "AVX512" and rows.dtype == torch.float32


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return (POINTER * len(tensors))(*[t.data_ptr() for t in tensors])
