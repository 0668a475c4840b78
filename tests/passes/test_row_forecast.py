"""Rows with a slope, written at different times: read along the line through their last values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moeca_compile.passes.row_forecast import CachedRows, Clock, old_slots, slope_name

ROWS, WIDTH = 4, 3


def caches(fill: float = math.nan) -> dict[str, Tensor]:
    """One row cache as it is before anything was written, padding row included."""
    return {
        "a": torch.full((ROWS + 1, WIDTH), fill),
        slope_name("a"): torch.full((ROWS + 1, WIDTH), fill),
        "a.time": torch.full((ROWS + 1,), fill),
    }


def at(held: dict[str, Tensor], now: float, known: float = 1.0) -> CachedRows:
    return CachedRows(held, Clock(torch.tensor(now), torch.tensor(known)))


def refresh(held: dict[str, Tensor], now: float, rows: Tensor, known: float = 1.0) -> None:
    without_padding = {name: cache[:-1] for name, cache in held.items()}
    cached = at(without_padding, now, known)
    cached.fill("a", "a.time", rows)
    cached.stamp_all("a.time")


def line(time: float) -> Tensor:
    """A different line in every element."""
    slope = torch.arange(ROWS * WIDTH, dtype=torch.float32).reshape(ROWS, WIDTH)
    return slope * time + 1


def test_lines_are_read_as_they_are_whenever_their_rows_were_written() -> None:
    held = caches()
    refresh(held, 0.9, line(0.9), known=0.0)
    torch.testing.assert_close(at(held, 0.8).read("a", "a.time", ROWS), line(0.9))
    index = torch.tensor([2, 0, ROWS])  # the last one is padding
    rows = torch.cat([line(0.7)[[2, 0]], torch.full((1, WIDTH), math.nan)])
    cached = at(held, 0.7)
    before = cached.stamp("a.time", index)
    assert before is not None and before[:2].tolist() == pytest.approx([0.9, 0.9])
    cached.write("a", index, rows, before)
    read = at(held, 0.5).read("a", "a.time", ROWS)
    torch.testing.assert_close(read[[0, 2]], line(0.5)[[0, 2]])
    torch.testing.assert_close(read[[1, 3]], line(0.9)[[1, 3]])  # known once: held
    refresh(held, 0.4, line(0.4))
    torch.testing.assert_close(at(held, 0.1).read("a", "a.time", ROWS), line(0.1))


def test_rows_of_something_else_are_not_even_looked_at() -> None:
    held = caches()
    refresh(held, 0.9, line(0.9), known=0.0)
    torch.testing.assert_close(at(held, 0.1).read("a", "a.time", ROWS), line(0.9))


def test_two_values_of_one_timestep_have_no_slope() -> None:
    held = caches(0.0)
    refresh(held, 0.9, line(0.9), known=0.0)
    refresh(held, 0.9, line(0.5))
    torch.testing.assert_close(at(held, 0.1).read("a", "a.time", ROWS), line(0.5))


def test_a_branch_of_another_expert_starts_anew() -> None:
    held = caches(0.0)
    refresh(held, 0.9, line(0.9), known=0.0)
    index = torch.arange(ROWS)
    cached = at(held, 0.7)
    same = torch.tensor([True, False, True, False])
    cached.write("a", index, line(0.7), cached.stamp("a.time", index), same)
    read = at(held, 0.5).read("a", "a.time", ROWS)
    torch.testing.assert_close(read[same], line(0.5)[same])
    torch.testing.assert_close(read[~same], line(0.7)[~same])


def test_branches_are_found_in_whatever_slot_they_are() -> None:
    slots, ids = torch.tensor([[3, 1], [0, 2]]), torch.tensor([[1, 3], [2, 5]])
    branch, same = old_slots(slots, ids)
    assert branch[same].tolist() == [1, 0, 3]
    assert same.tolist() == [True, True, True, False]


def test_held_rows_need_no_clock() -> None:
    held = caches(0.0)
    cached = CachedRows(held)
    cached.write("a", torch.tensor([1]), line(0.5)[:1], cached.stamp("", torch.tensor([1])))
    torch.testing.assert_close(cached.read("a", "", ROWS)[1], line(0.5)[0])
    with pytest.raises(ValueError, match="clock"):
        cached.read("a", "a.time", ROWS)
