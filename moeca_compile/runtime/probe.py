"""A few numbers of the sample that tell whether this call continues the last one.

    sample [B, C, H, W]  --coprime stride, at most 512 elements-->  unit rows [R, P], R <= 8
    chords(old, new) [R] = length of the difference of two unit rows = sqrt(2 - 2 cos)
    judge_chords(...)    ->  "continues" | "unclear" | "broken"

Directions, not values: samplers in sigma space shrink the sample by 80 in a generation. The worst
row counts, so one replaced sample in a batch is seen (exactly up to 8 samples, by group beyond).

The bounds, from the trained 32 x 32 model and from the formulas of common samplers: the largest
chord of one step is 0.12 (Euler or Heun, 20 steps), 0.24 (10), 0.42 (20 steps, shift 12), the first
one 0.06 (0.31 with 4 steps); from one step to the next it grew at most 2.0 times (2.6 with 10) and
by 0.22. A new noise tensor is 0.85 and more away at noise level 0.5, any other image in the batch
0.5 and more even at level 0.05. What stays below every bound (the same image noised again at level
0.05: 0.07) has moved less than an ordinary step moves.
Wider steps than that refresh needlessly: some of Karras below 12 steps, of Euler below 5.
Stochastic samplers move as far as another generation would (0.4 to 0.7 with eta 0.5, 0.6 to 0.9
ancestral with 20 steps): such steps are unclear and refresh, unless the caller vouches for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

PROBE_ELEMENTS = 512
PROBE_ROWS = 8  # 64 elements a row: with fewer, a stochastic sampler's noise decides

BROKEN_CHORD = 1.0  # cosine 0.5: another sample, whatever came before
WIDE_CHORD = 0.5  # cosine 0.875: could be another sample
FIRST_CHORD = 0.35  # cosine 0.94: the same while the width of this generation's steps is unknown
SMALL_CHORD = 0.1  # cosine 0.995: less than one step of a 20-step sampler
JUMP_RATIO = 3.0  # over the largest of the last JUMP_WINDOW chords ...
JUMP_MARGIN = 0.3  # ... and no more than this above it
JUMP_WINDOW = 4

Continuity = Literal["continues", "unclear", "broken"]


def take_probe(sample: Tensor) -> Tensor | None:
    """Unit rows [R, P] float32 of `sample`, own memory, same device; None for an empty sample."""
    if sample.numel() == 0:
        return None
    batch = sample.shape[0] if sample.dim() > 1 else 1
    rows, width, stride = _plan(sample.numel(), batch)
    if sample.is_contiguous():
        picked = torch.as_strided(
            sample.detach(), (rows, width), (width * stride, stride), sample.storage_offset()
        )
    else:
        picked = sample.detach()[_positions(sample.shape, rows, width, stride, sample.device)]
    values = (picked.real if picked.is_complex() else picked).float()
    norm = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    return values / norm.clamp_min(1e-30)  # an all-zero row stays zero and equals itself


def chords(old: Tensor, new: Tensor) -> Tensor:
    """[R] distances of unit rows `[R, P]`; 0: same direction, 1.41: unrelated, NaN: NaN input."""
    return torch.linalg.vector_norm(new - old, dim=1)


def judge_chords(chord: float, recent: Sequence[float], vouched: bool = False) -> Continuity:
    """Whether a sample that moved by `chord` is the next one of its generation.

    recent: chords of the generation so far that did continue, the last JUMP_WINDOW count. vouched:
    the caller knows that it is one generation, only BROKEN_CHORD counts. NaN is "unclear".
    """
    if math.isnan(chord):
        return "unclear"
    if chord > BROKEN_CHORD:
        return "broken"
    if vouched:
        return "continues"
    if not recent:
        return "unclear" if chord > FIRST_CHORD else "continues"
    widest = max(recent[-JUMP_WINDOW:])
    if chord > max(SMALL_CHORD, min(JUMP_RATIO * widest, JUMP_MARGIN + widest)):
        return "broken"
    return "unclear" if chord > WIDE_CHORD else "continues"


@lru_cache(maxsize=64)
def _plan(numel: int, batch: int) -> tuple[int, int, int]:
    """(rows, elements per row, stride). The stride shares no factor with `numel`, hence with no
    dimension: the probe cannot sit in one column of the image."""
    stride = -(-numel // PROBE_ELEMENTS)
    while math.gcd(stride, numel) != 1:
        stride += 1
    count = -(-numel // stride)
    rows = min(batch, PROBE_ROWS, count)
    return rows, count // rows, stride


@lru_cache(maxsize=16)
def _positions(
    shape: torch.Size, rows: int, width: int, stride: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Index tensors [R, P], one per dimension, of the same elements in a non-contiguous sample."""
    with torch.inference_mode(False):
        flat = torch.arange(rows * width, device=device).mul_(stride).view(rows, width)
        return torch.unravel_index(flat, shape)
