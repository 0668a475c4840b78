"""Row caches: any value with token rows is stored as a matrix of rows and read back as it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node

from moeca_compile.graph.layout import Factor, Layout, RowSpace, Selection, free, gather_rows
from moeca_compile.graph.region import RowRoot
from moeca_compile.graph.row_cache import RowCache, padded_index

SPACE = RowSpace(2, 6)
B, N, H = Factor(2, "b"), Factor(6, "n"), Factor(3)
LAYOUTS: dict[str, Layout] = {
    "[B, N, D]": ((B,), (N,), free(12)),
    "[T, D]": ((B, N), free(12)),
    "[B, H, N, d]": ((B,), (H,), (N,), free(4)),
    "[B, N, H, d]": ((B,), (N,), (H,), free(4)),
    "[B * H, N, d]": ((B, H), (N,), free(4)),
    "[B * H, d, N]": ((B, H), free(4), (N,)),
    "[N, B, D]": ((N,), (B,), free(12)),
    "[H * B, N, d]": ((H, B), (N,), free(4)),
    "[B, N]": ((B,), (N,)),
}
EACH = Selection(SPACE, torch.tensor([5, 0, 2, 11, 6, 7]), 3, per_sample=True)
FLAT = Selection(SPACE, torch.tensor([8, 3, 2, 10]), 4, per_sample=False)


def value_of(layout: Layout) -> Tensor:
    shape = [math.prod(f.size for f in dim) for dim in layout]
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


def cache_of(layout: Layout, space: RowSpace = SPACE) -> RowCache:
    node: Node = Graph().placeholder("value")
    node.meta["val"] = value_of(layout)
    return RowCache("cache", RowRoot(node, layout), space)


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_rows_go_in_and_come_back(name: str) -> None:
    layout = LAYOUTS[name]
    cache, value = cache_of(layout), value_of(layout)
    rows = cache.to_rows(value)
    assert rows.shape == (SPACE.rows, cache.width)
    assert torch.equal(cache.from_rows(rows), value)
    # A row holds one token: its elements are those of the token, in row-major order.
    one = Selection(SPACE, torch.tensor([8]), 1, per_sample=False)
    assert torch.equal(rows[8], gather_rows(value, layout, one).flatten())


@pytest.mark.parametrize("chosen", [EACH, FLAT], ids=["per sample", "flat"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_selected_rows_are_written_where_all_rows_would_be(name: str, chosen: Selection) -> None:
    layout = LAYOUTS[name]
    cache, value = cache_of(layout), value_of(layout)
    stored = cache.to_rows(torch.zeros_like(value)).clone()
    picked = gather_rows(value, layout, chosen)
    stored.index_copy_(0, chosen.flat, cache.to_rows(picked, chosen))
    wanted = torch.zeros_like(stored)
    wanted[chosen.flat] = cache.to_rows(value)[chosen.flat]
    assert torch.equal(stored, wanted)
    assert torch.equal(gather_rows(cache.from_rows(stored), layout, chosen), picked)


def test_a_single_sample_may_have_lost_its_dim() -> None:
    space = RowSpace(1, 6)
    layout = ((H,), (N,), free(4))
    cache, value = cache_of(layout, space), value_of(layout)
    chosen = Selection(space, torch.tensor([4, 1]), 2, per_sample=True)
    rows = cache.to_rows(value)
    assert rows.shape == (6, 12)
    assert torch.equal(cache.from_rows(rows), value)
    picked = cache.to_rows(gather_rows(value, layout, chosen), chosen)
    assert torch.equal(picked, rows[[4, 1]])


def test_reading_makes_no_copy() -> None:
    cache = cache_of(LAYOUTS["[B, H, N, d]"])
    rows = cache.to_rows(value_of(LAYOUTS["[B, H, N, d]"])).contiguous()
    assert cache.from_rows(rows).data_ptr() == rows.data_ptr()


def test_padding_is_written_behind_the_last_row() -> None:
    valid = torch.tensor([[True, True, False], [True, False, False]])
    index = padded_index(EACH, valid)
    assert index.tolist() == [5, 0, 12, 11, 12, 12]
    cache = torch.zeros(SPACE.rows + 1, 1)
    cache.index_copy_(0, index, torch.ones(6, 1))
    assert cache[: SPACE.rows].flatten().nonzero().flatten().tolist() == [0, 5, 11]
