"""Where token rows live inside a tensor: the bookkeeping behind row subsetting.

A tensor of T = B * N token rows has its samples (`b`, size B) and its tokens (`n`, size N)
somewhere in its dims, alone or merged with others. A layout says where, as factors per dim in
row-major order; a selection says which rows are wanted. `recut` moves a layout through a reshape.

    [B, N, D]      (b,) (n,) (D,)          linear output
    [B, H, N, d]   (b,) (H,) (n,) (d,)     attention operand
    [T, D]         (b, n) (D,)             expert input
    [B, M, D]      (b,) (n in M,) (D,)     rows of another stream behind or before the tokens
    selected per sample, idx [B, n']:  n -> n'           flat, rows [R]:  b -> 1, n -> R
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """One row-major factor of a dim. `tag` is "b" (sample), "n" (token) or None (free).

    start: where the tokens begin in a dim that holds more rows than the tokens (joint streams).
    """

    size: int
    tag: str | None = None
    start: int = 0


Dim = tuple[Factor, ...]
Layout = tuple[Dim, ...]


@dataclass(frozen=True)
class RowSpace:
    """`samples` x `tokens` rows; a token's flat index is `sample * tokens + token`."""

    samples: int
    tokens: int

    @property
    def rows(self) -> int:
        return self.samples * self.tokens


@dataclass(frozen=True)
class Selection:
    """Which rows are wanted. `flat [B * n or R]` holds flat row indices in [0, B * N).

    per_sample: the rows are B groups of `count`, one for each sample (batched attention stays
    batched); otherwise `count` rows of any samples.
    """

    space: RowSpace
    flat: Tensor
    count: Any  # int or SymInt
    per_sample: bool

    @property
    def sizes(self) -> dict[str, Any]:
        return {"b": self.space.samples if self.per_sample else 1, "n": self.count}

    def split_index(self) -> tuple[Tensor, Tensor]:
        """Sample and token index, each [B, n] (per sample) or [R] (flat)."""
        flat = self.flat
        if self.per_sample:
            flat = flat.reshape(self.space.samples, self.count)
        sample = torch.div(flat, self.space.tokens, rounding_mode="floor")
        return sample, flat - sample * self.space.tokens


def free(size: int) -> Dim:
    return (Factor(size),)


def free_layout(shape: Sequence[int]) -> Layout:
    return tuple(free(int(s)) for s in shape)


def tags(layout: Layout | Dim) -> frozenset[str]:
    """The tags of a layout or of one dim."""
    flat = [f for d in layout for f in (d if isinstance(d, tuple) else (d,))]
    return frozenset(f.tag for f in flat if f.tag)


def row_layout(shape: Sequence[int], space: RowSpace) -> Layout | None:
    """The layout of token rows at the front of `shape`: [B, N, ...] or [B * N, ...]; else None."""
    b, n = Factor(space.samples, "b"), Factor(space.tokens, "n")
    if len(shape) >= 2 and shape[0] == space.samples and shape[1] == space.tokens:
        return ((b,), (n,), *free_layout(shape[2:]))
    if len(shape) >= 1 and shape[0] == space.rows:
        return ((b, n), *free_layout(shape[1:]))
    return None


def window(size: int, start: int) -> Dim:
    """A dim of `size` rows in which the tokens begin at `start`."""
    return (Factor(size, "n", start),)


def is_windowed(layout: Layout, space: RowSpace) -> bool:
    """Whether the value holds other rows besides the tokens."""
    return any(f.tag == "n" and f.size != space.tokens for dim in layout for f in dim)


def selected_shape(layout: Layout, selection: Selection) -> list[Any]:
    """The shape of a value in `layout` once only the selected rows are left."""
    shape = []
    for dim in layout:
        size: Any = 1
        for factor in dim:
            size = size * (selection.sizes[factor.tag] if factor.tag else factor.size)
        shape.append(size)
    return shape


def recut(layout: Layout, shape: Sequence[int]) -> Layout | None:
    """The layout of the same elements under another `shape`, row-major; None where a row is cut.

    Free factors may be split and merged, tagged ones may not. Adjacent free factors come back as
    one, so that equal requests for a value are equal layouts.
    """
    queue = _merge_free(f for dim in layout for f in dim)
    out: list[Dim] = []
    for size in shape:
        taken: list[Factor] = []
        product = 1
        while product != size:
            if not queue:
                return None
            factor = queue.pop(0)
            need = size // product
            if size % (product * factor.size) == 0:
                taken.append(factor)
                product *= factor.size
            elif factor.tag is None and size % product == 0 and factor.size % need == 0:
                taken.append(Factor(need))
                queue.insert(0, Factor(factor.size // need))
                product = size
            else:
                return None
        # A tagged factor of size one (a single sample) belongs to the size-one dim it meets.
        if size == 1 and queue and queue[0].tag and queue[0].size == 1:
            taken.append(queue.pop(0))
        out.append(tuple(taken))
    for factor in queue:  # only size-one tagged factors can be left
        if factor.size != 1 or not out:
            return None
        out[-1] = (*out[-1], factor)
    return tuple(out)


def _merge_free(factors: Iterable[Factor]) -> list[Factor]:
    """The same factors without free ones of size one, neighbouring free ones multiplied."""
    out: list[Factor] = []
    for factor in factors:
        if factor.tag is None and factor.size == 1:
            continue
        if factor.tag is None and out and out[-1].tag is None:
            out[-1] = Factor(out[-1].size * factor.size)
        else:
            out.append(factor)
    return out


def align(operand_shape: Sequence[int], layout: Layout) -> Layout:
    """Layout of a broadcasting operand, right-aligned to a result in `layout`."""
    dims: list[Dim] = []
    offset = len(layout) - len(operand_shape)
    for i, size in enumerate(operand_shape):
        dim = layout[offset + i]
        whole = 1
        for factor in dim:
            whole *= factor.size
        dims.append(dim if size == whole else free(int(size)))
    return tuple(dims)


def gather_rows(full: Tensor, layout: Layout, selection: Selection) -> Tensor:
    """The selected rows of a value that is there in full; its layout stays.

    Raises ValueError for a tensor with one tag only (positions, modulation): where its rows belong
    depends on what it is combined with, see `gather_operand`.
    """
    present = tags(layout)
    if not present or (present == {"b"} and selection.per_sample):
        return full
    if present == {"b", "n"} or (present == {"n"} and selection.space.samples == 1):
        return _gather_both(full, layout, selection)
    raise ValueError(f"rows with only the tags {sorted(present)} need a target layout")


def _gather_both(full: Tensor, layout: Layout, selection: Selection) -> Tensor:
    factors = [f for dim in layout for f in dim]
    where = {f.tag: i for i, f in enumerate(factors) if f.tag}
    names = [t for t in ("b", "n") if t in where]
    lead = [where[t] for t in names]
    rest = [i for i in range(len(factors)) if i not in lead]
    split = full.reshape([f.size for f in factors]).permute(lead + rest)
    sample, token = selection.split_index()
    token = token + factors[where["n"]].start
    picked = split[sample, token] if len(lead) == 2 else split[token]
    rest_sizes = [factors[i].size for i in rest]
    picked = picked.reshape([selection.sizes[t] for t in names] + rest_sizes)
    order = lead + rest
    back = [order.index(i) for i in range(len(factors))]
    return picked.permute(back).reshape(selected_shape(layout, selection))


def gather_operand(full: Tensor, own: Layout, result: Layout, selection: Selection) -> Tensor:
    """Selected rows of a broadcasting operand in layout `own`, shaped to combine with `result`.

    Raises ValueError when the rows cannot be brought there (a lone tag merged with others).
    """
    present = tags(own)
    if present != {"n"} and not (present == {"b"} and not selection.per_sample):
        return gather_rows(full, own, selection)
    if present == {"n"} and selection.space.samples == 1 and "b" not in tags(result):
        return gather_rows(full, own, selection)
    full = full.reshape([1] * (len(result) - full.dim()) + list(full.shape))
    own = (((),) * (len(result) - len(own))) + own
    (tag,) = present
    source = _dim_of(own, tag)
    if not _alone(own[source]):
        raise ValueError(f"a lone {tag!r} row factor merged with others cannot be gathered")
    sample, token = selection.split_index()
    begins = next(f.start for f in own[source] if f.tag == tag)
    index = ((sample if tag == "b" else token) + begins).reshape(-1)
    picked = full.index_select(source, index)
    if selection.per_sample:
        return _spread_samples(picked, source, result, selection)
    n_dim = _dim_of(result, "n")
    if n_dim != source and not _alone(result[n_dim]):
        raise ValueError("a sample's value for token rows merged with others cannot be gathered")
    return picked.transpose(source, n_dim) if source != n_dim else picked


def _spread_samples(picked: Tensor, source: int, result: Layout, selection: Selection) -> Tensor:
    """Positions [.., B * n, ..] gathered at dim `source` -> samples at their dim of `result`."""
    b_dim = _dim_of(result, "b")
    if b_dim == source:
        raise ValueError("positions whose dim also holds the samples cannot be gathered")
    sizes = list(picked.shape)
    split = [*sizes[:source], selection.space.samples, selection.count, *sizes[source + 1 :]]
    spread = picked.reshape(split).movedim(source, b_dim).squeeze(b_dim + 1)
    merged = result[b_dim]
    if _alone(merged):
        return spread
    # [.., B, ..] -> [.., B * H, ..]: each sample's rows once for every other factor of that dim.
    before, after = list(spread.shape[:b_dim]), list(spread.shape[b_dim + 1 :])
    narrow = [f.size if f.tag else 1 for f in merged]
    wide = [f.size for f in merged]
    whole = spread.reshape([*before, *narrow, *after]).expand([*before, *wide, *after])
    return whole.reshape([*before, math.prod(wide), *after])


def _alone(dim: Dim) -> bool:
    """Whether a dim is one tagged factor, but for free factors of size one."""
    return len(dim) == 1 or sum(f.tag is not None or f.size != 1 for f in dim) == 1


def _dim_of(layout: Layout, tag: str) -> int:
    return next(i for i, dim in enumerate(layout) if tag in tags(dim))
