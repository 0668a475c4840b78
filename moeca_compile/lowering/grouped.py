"""Products of every expert with its own rows, without asking the host where they end.

    ends [E] on the device   rows [R, I] sorted by expert   weights E x [O, I]
    ->  one grouped product over stacked weights, [R, O]; bias by row; zero past the last end

On a CPU the op `moeca::grouped_linear` stays: it reads `ends` for free and takes weights as they
are. A list of E weights is stacked at every call, which moves them once through memory; a model
that keeps one [E, O, I] parameter is spared that.
"""

from __future__ import annotations

import torch
from torch import Tensor

moeca = torch.ops.moeca
ALIGNMENT = 8  # elements: grouped products want rows of 16 bytes


def on_device(rows: Tensor, weights: list[Tensor]) -> bool:
    """Whether a grouped product runs there: CUDA, bfloat16, sizes it takes."""
    if rows.device.type != "cuda" or rows.dtype != torch.bfloat16:
        return False
    return all(size % ALIGNMENT == 0 for size in (rows.shape[-1], weights[0].shape[-2]))


def grouped_linear(
    rows: Tensor, ends: Tensor, weights: list[Tensor], biases: list[Tensor]
) -> Tensor:
    """As `moeca::grouped_linear`, by the way that suits device and dtype."""
    if not on_device(rows, weights):
        return moeca.grouped_linear(rows, ends, weights, biases)
    return grouped_product(rows, ends, weights, biases)


def grouped_product(
    rows: Tensor, ends: Tensor, weights: list[Tensor], biases: list[Tensor]
) -> Tensor:
    """rows: [R, I]; ends: [E]; weights: E of [O, I] or one [E, O, I]; biases: none, or alike."""
    bank = _stacked(weights, 3)
    out = torch.ops.aten._grouped_mm(rows, bank.transpose(1, 2), ends.to(torch.int32))
    number = torch.arange(rows.shape[0], device=rows.device, dtype=ends.dtype)
    if biases:
        expert = torch.searchsorted(ends, number, right=True).clamp(max=len(ends) - 1)
        out = out + _stacked(biases, 2).index_select(0, expert)
    # Nobody wrote past the last end: what lies there may be NaN.
    return torch.where((number < ends[-1]).unsqueeze(1), out, 0)


def _stacked(tensors: list[Tensor], dims: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 and tensors[0].dim() == dims else torch.stack(tensors)
