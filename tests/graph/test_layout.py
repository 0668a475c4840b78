"""Layouts and gathers against brute force: tensors whose entries say which row they belong to."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from moeca_compile.graph.layout import (
    Factor,
    Layout,
    RowSpace,
    Selection,
    align,
    free,
    gather_operand,
    gather_rows,
    recut,
    row_layout,
    selected_shape,
    tags,
)

B, N = Factor(2, "b"), Factor(6, "n")
SPACE = RowSpace(2, 6)


def selection(space: RowSpace, *, per_sample: bool, count: int, seed: int = 0) -> Selection:
    """`count` distinct random rows, of every sample or of all of them, in random order."""
    generator = torch.Generator().manual_seed(seed)
    if not per_sample:
        flat = torch.randperm(space.rows, generator=generator)[:count]
        return Selection(space, flat, count, False)
    rows = [
        sample * space.tokens + torch.randperm(space.tokens, generator=generator)[:count]
        for sample in range(space.samples)
    ]
    return Selection(space, torch.cat(rows), count, True)


def coded(layout: Layout, space: RowSpace) -> Tensor:
    """An integer tensor in `layout`: entry = flat row index * 1000 + index within the row.

    With one tag only, the row index is the sample or the token alone.
    """
    factors = [f for dim in layout for f in dim]
    value = torch.zeros([f.size for f in factors], dtype=torch.int64)
    inner = 1
    for i, factor in reversed(list(enumerate(factors))):
        steps = torch.arange(factor.size).reshape([-1] + [1] * (len(factors) - i - 1))
        if factor.tag is None:
            value = value + steps * inner
            inner *= factor.size
        elif factor.tag == "n":
            value = value + steps * 1000
        else:
            with_tokens = any(f.tag == "n" for f in factors)
            value = value + steps * 1000 * (space.tokens if with_tokens else 1)
    return value.reshape([math.prod(f.size for f in dim) for dim in layout])


def expected(layout: Layout, chosen: Selection) -> Tensor:
    """The coded tensor of the selected rows, built entry by entry from the definition."""
    factors = [f for dim in layout for f in dim]
    sizes = [chosen.sizes[f.tag] if f.tag else f.size for f in factors]
    out = torch.empty(sizes, dtype=torch.int64)
    for at in itertools.product(*[range(s) for s in sizes]):
        inner, code, b, n = 1, 0, 0, 0
        for factor, i in reversed(list(zip(factors, at))):
            if factor.tag is None:
                code += i * inner
                inner *= factor.size
            elif factor.tag == "b":
                b = i
            else:
                n = i
        row = chosen.flat[b * chosen.count + n if chosen.per_sample else n].item()
        out[at] = int(row) * 1000 + code
    return out.reshape(selected_shape(layout, chosen))


@pytest.mark.parametrize(
    ("layout", "shape", "result"),
    [
        (((B,), (N,), free(12)), (2, 6, 3, 4), ((B,), (N,), free(3), free(4))),
        (((B,), (N,), free(3), free(4)), (2, 6, 12), ((B,), (N,), free(12))),
        (((B,), (N,), free(12)), (12, 12), ((B, N), free(12))),
        (((B, N), free(12)), (2, 6, 4, 3), ((B,), (N,), free(4), free(3))),
        (((B,), free(3), (N,), free(4)), (6, 6, 4), ((B, Factor(3)), (N,), free(4))),
        (((B, Factor(3)), (N,), free(4)), (2, 3, 6, 4), ((B,), free(3), (N,), free(4))),
        (((B,), (N,), free(6), free(4)), (2, 6, 4, 6), ((B,), (N,), free(4), free(6))),
        (((B,), (N,), free(4)), (1, 2, 6, 4, 1), ((), (B,), (N,), free(4), ())),
        (((B,), (N,), free(4)), (48,), ((B, N, Factor(4)),)),
    ],
)
def test_recut_follows_a_reshape(layout: Layout, shape: tuple[int, ...], result: Layout) -> None:
    assert recut(layout, shape) == result


@pytest.mark.parametrize(
    "shape",
    [(2, 2, 3, 4), (2, 24), (4, 3, 4), (3, 4, 4), (2, 3, 8), (12, 2, 2), (6, 2, 4)],
)
def test_recut_splits_no_rows(shape: tuple[int, ...]) -> None:
    layout = ((B,), (N,), free(4))
    found = recut(layout, shape)
    flat = [] if found is None else [f for dim in found for f in dim if f.tag]
    if shape == (2, 24):
        assert found == ((B,), (N, Factor(4)))
    elif shape == (12, 2, 2):
        assert found == ((B, N), free(2), free(2))
    else:
        assert found is None, flat


def test_recut_keeps_the_tag_of_a_single_sample() -> None:
    one, n = Factor(1, "b"), Factor(6, "n")
    for shape in [(6, 4), (1, 6, 4), (1, 1, 6, 4), (6, 1, 4), (6, 2, 2), (24,)]:
        found = recut(((one,), (n,), free(4)), shape)
        assert found is not None, shape
        assert tags(found) == {"b", "n"}, shape
        assert [math.prod(f.size for f in d) for d in found] == list(shape)
    last = recut(((n,), free(4), (one,)), (6, 4))
    assert last == ((n,), (Factor(4), one))


def test_equal_requests_are_equal_layouts() -> None:
    heads = ((B,), (N,), free(3), free(4))
    assert recut(heads, (2, 6, 12)) == ((B,), (N,), free(12))


def test_align_tags_only_dims_of_full_size() -> None:
    layout = ((B,), (Factor(3),), (N,), free(4))
    assert align((2, 1, 6, 4), layout) == ((B,), free(1), (N,), free(4))
    assert align((6, 1), layout) == ((N,), free(1))
    assert align((1, 3, 1, 4), layout) == (free(1), free(3), free(1), free(4))
    assert align((), layout) == ()
    merged = ((B, Factor(3)), (N,))
    assert align((6, 1), merged) == ((B, Factor(3)), free(1))


def test_row_layout_finds_rows_in_front() -> None:
    assert row_layout((2, 6, 4), SPACE) == ((B,), (N,), free(4))
    assert row_layout((12, 4), SPACE) == ((B, N), free(4))
    assert row_layout((6, 2, 4), SPACE) is None
    assert row_layout((), SPACE) is None


def test_selected_shape_counts_rows_once() -> None:
    layout = ((B, Factor(3)), (N,), free(4))
    assert selected_shape(layout, selection(SPACE, per_sample=True, count=5)) == [6, 5, 4]
    assert selected_shape(layout, selection(SPACE, per_sample=False, count=5)) == [3, 5, 4]


def random_layout(rng: random.Random, space: RowSpace) -> Layout:
    """Both tags and up to three free factors in any order, merged into dims at random."""
    factors = [Factor(space.samples, "b"), Factor(space.tokens, "n")]
    factors += [Factor(rng.choice([1, 2, 3])) for _ in range(rng.randint(0, 3))]
    rng.shuffle(factors)
    dims: list[list[Factor]] = [[]]
    for factor in factors:
        if dims[-1] and rng.random() < 0.6:
            dims.append([])
        dims[-1].append(factor)
    return tuple(tuple(d) for d in dims)


@pytest.mark.parametrize("seed", range(40))
def test_gather_takes_exactly_the_selected_rows(seed: int) -> None:
    rng = random.Random(seed)
    space = RowSpace(rng.choice([1, 2, 3]), rng.choice([4, 5]))
    layout = random_layout(rng, space)
    per_sample = rng.random() < 0.5
    chosen = selection(space, per_sample=per_sample, count=rng.randint(1, 4), seed=seed)
    full = coded(layout, space)
    got = gather_rows(full, layout, chosen)
    assert torch.equal(got, expected(layout, chosen))
    # The tag of a single sample may get lost on the way (unsqueeze of dim 0): same rows.
    if space.samples == 1:
        lost = tuple(tuple(f for f in d if f.tag != "b") for d in layout)
        assert torch.equal(gather_rows(full, lost, chosen), got)


@pytest.mark.parametrize("seed", range(40))
def test_recut_describes_what_reshape_does(seed: int) -> None:
    """Reshape, then gather by the recut layout = gather, then reshape."""
    rng = random.Random(1000 + seed)
    space = RowSpace(rng.choice([1, 2, 3]), rng.choice([4, 5]))
    layout = random_layout(rng, space)
    sizes = [f.size for dim in layout for f in dim]
    shape: list[int] = [1]
    for size in sizes:
        if rng.random() < 0.5:
            shape.append(size)
        else:
            shape[-1] *= size
    after = recut(layout, shape)
    assert after is not None
    chosen = selection(space, per_sample=rng.random() < 0.5, count=3, seed=seed)
    full = coded(layout, space)
    got = gather_rows(full.reshape(shape), after, chosen)
    want = expected(layout, chosen).reshape(selected_shape(after, chosen))
    assert torch.equal(got, want)


RESULTS: list[Layout] = [
    ((B,), (N,), free(4)),
    ((B,), free(3), (N,), free(4)),
    ((N,), (B,), free(4)),
    ((N,), free(3), (B,), free(4)),
    ((B, Factor(3)), (N,), free(4)),
    ((Factor(3), B), (N,), free(4)),
    ((B,), (N,), free(3), free(4)),
]


def lone_dims() -> list[tuple[int, str]]:
    """(layout, tag) where the tag has a dim of its own, so that operands broadcast to it."""
    pairs = itertools.product(range(len(RESULTS)), ("b", "n"))
    return [(i, tag) for i, tag in pairs if any(len(d) == 1 and tag in tags(d) for d in RESULTS[i])]


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize(("number", "tag"), lone_dims())
@pytest.mark.parametrize("short", [True, False])
def test_broadcast_operands_meet_the_right_rows(
    number: int, tag: str, short: bool, per_sample: bool
) -> None:
    """full + operand, gathered = gathered full + gathered operand: positions and modulation."""
    result = RESULTS[number]
    shape = [math.prod(f.size for f in dim) for dim in result]
    source = next(i for i, dim in enumerate(result) if tag in tags(dim))
    sizes = [s if i in (source, len(shape) - 1) else 1 for i, s in enumerate(shape)]
    if short:
        sizes = sizes[source:]
    operand = torch.randint(1000, sizes, generator=torch.Generator().manual_seed(number))
    chosen = selection(SPACE, per_sample=per_sample, count=4, seed=number)
    full = coded(result, SPACE) * 1000
    own = align(sizes, result)
    assert tags(own) == {tag}
    want = gather_rows(full + operand, result, chosen)
    got = gather_rows(full, result, chosen) + gather_operand(operand, own, result, chosen)
    assert torch.equal(got, want)


def test_single_sample_positions_need_no_sample_dim() -> None:
    space = RowSpace(1, 6)
    result = ((Factor(6, "n"),), free(4))
    chosen = selection(space, per_sample=True, count=4)
    table = torch.arange(6).reshape(6, 1)
    got = gather_operand(table, align((6, 1), result), result, chosen)
    assert got.flatten().tolist() == chosen.flat.tolist()


def test_gathers_without_a_place_for_the_rows_are_refused() -> None:
    flat = selection(SPACE, per_sample=False, count=4)
    each = selection(SPACE, per_sample=True, count=4)
    with pytest.raises(ValueError, match="target layout"):
        gather_rows(torch.zeros(2, 4), ((B,), free(4)), flat)
    with pytest.raises(ValueError, match="target layout"):
        gather_rows(torch.zeros(6, 4), ((N,), free(4)), each)
    merged = ((B,), (N, Factor(3)), free(4))
    operand = torch.zeros(18, 4)
    with pytest.raises(ValueError, match="merged"):
        gather_operand(operand, align((18, 4), merged), merged, each)
    with pytest.raises(ValueError, match="merged"):
        gather_operand(torch.zeros(2, 1, 4), align((2, 1, 4), merged), merged, flat)


def test_values_without_rows_stay_whole() -> None:
    table = torch.arange(8).reshape(2, 4)
    each = selection(SPACE, per_sample=True, count=4)
    assert gather_rows(table, (free(2), free(4)), each) is table
    assert gather_rows(table, ((B,), free(4)), each) is table  # whole samples
