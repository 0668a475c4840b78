"""Cached rows with a slope: writing a row keeps how it changed, reading it goes on along that.

    write   slope[i] <- (new - row[i]) / (now - time[i]);  row[i] <- new;  time[i] <- now
    read    row + slope * (now - time)

    slot_out [T * K + 1, D]   slot_out.slope, the same   slot_time [T * K + 1] float32

Newton's form of a line through a row's last two values, at steps that differ from row to row
(TaylorSeer, arXiv 2503.06923, has one such line per layer). The slope is zero, the row held, where
nothing earlier is known, where that is another expert's, and where both are of one timestep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .cache_plan import LayerPlan

moeca = torch.ops.moeca
SLOPE = "slope"


def slope_name(name: str) -> str:
    """The cache tensor with the slopes of the rows in cache `name`."""
    return f"{name}.{SLOPE}"


@dataclass(frozen=True)
class Clock:
    """Where a step lies on the axis of forecasts, float32 scalars on the device of the rows.

    known: 0 where the lane's rows are those of something else and may not even be looked at.
    """

    now: Tensor
    known: Tensor


@dataclass(frozen=True)
class CachedRows:
    """Rows of one lane in a variant under construction. times: everywhere the name of the tensor
    that says when rows were written, "" where they are held and no clock is needed."""

    caches: dict[str, Tensor]
    clock: Clock | None = None

    def read(self, name: str, times: str, rows: int) -> Tensor:
        """The first `rows` rows of cache `name` as of now: [rows, W], float32 if extrapolated."""
        held = moeca.cache_read(self.caches[name], rows)
        if not times:
            return held
        slope = moeca.cache_read(self.caches[slope_name(name)], rows)
        age = self._clock().now - moeca.cache_read(self.caches[times], rows)
        return held.float() + slope.float() * age.unsqueeze(1)

    def stamp(self, times: str, index: Tensor) -> Tensor | None:
        """Rows `index [R]` are of now; returns when they were written before [R], for `write`."""
        if not times:
            return None
        before = self.caches[times].index_select(0, index)
        moeca.cache_write(self.caches[times], index, self._clock().now.expand(index.shape[0]))
        return before

    def write(
        self,
        name: str,
        index: Tensor,
        rows: Tensor,
        before: Tensor | None,
        same: Tensor | None = None,
    ) -> None:
        """Overwrite rows `index [R]` of cache `name`. before: what `stamp` gave for them.

        same: bool [R], rows that go on with what is cached there; None: all of them.
        """
        if before is not None:
            old = self.caches[name].index_select(0, index)
            slope = self.slope(rows, old, before, same)
            moeca.cache_write(self.caches[slope_name(name)], index, slope)
        moeca.cache_write(self.caches[name], index, rows)

    def fill(self, name: str, times: str, rows: Tensor) -> None:
        """Overwrite all rows; `stamp_all` has to follow."""
        if times:
            old = moeca.cache_read(self.caches[name], rows.shape[0])
            before = moeca.cache_read(self.caches[times], rows.shape[0])
            moeca.cache_fill(self.caches[slope_name(name)], self.slope(rows, old, before))
        moeca.cache_fill(self.caches[name], rows)

    def stamp_all(self, times: str) -> None:
        """All rows are of now. Behind the last `fill` of rows with these times."""
        cache = self.caches[times]
        moeca.cache_fill(cache, self._clock().now.expand(cache.shape[0]))

    def slope(
        self, rows: Tensor, old: Tensor, before: Tensor, same: Tensor | None = None
    ) -> Tensor:
        """Slopes [R, W] from `old [R, W]` at times `before [R]` to `rows` now."""
        clock = self._clock()
        passed = clock.now - before
        usable = (passed != 0) & (clock.known != 0)
        if same is not None:
            usable = usable & same
        new = rows.to(old.dtype).float()  # as it is stored: rounding makes no slope
        slope = (new - old.float()) / torch.where(usable, passed, 1.0).unsqueeze(1)
        return torch.where(usable.unsqueeze(1), slope, 0.0).to(old.dtype)

    def _clock(self) -> Clock:
        if self.clock is None:
            raise ValueError("forecast rows: expected the policy's clock, got none")
        return self.clock


def store_branches(
    layer: LayerPlan, rows: CachedRows, ids: Tensor, order: Tensor, out: Tensor
) -> None:
    """Store all branches at a refresh: `out [T * K, D]` of the branches in `order`.

    Slot k holds rank k of the router from now on; the same expert may have been in another slot.
    """
    name = layer.name("slot_out")
    if layer.slopes:
        branch, same = old_slots(rows.caches[layer.name("slot_ids")], ids)
        place = branch.index_select(0, order)
        old = rows.caches[name].index_select(0, place)
        before = rows.caches[layer.slot_times].index_select(0, place)
        slope = rows.slope(out, old, before, same.index_select(0, order))
        moeca.cache_write(rows.caches[slope_name(name)], order, slope)
    moeca.cache_write(rows.caches[name], order, out)


def old_slots(slot_ids: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(branch [T * K], same [T * K]): where each of `ids [T, K]` is cached, and whether it is."""
    tokens, slots = ids.shape
    equal = ids.unsqueeze(2) == slot_ids.unsqueeze(1)  # [T, k, slot]
    slot = equal.to(torch.int32).argmax(2)
    base = torch.arange(tokens, device=ids.device).unsqueeze(1) * slots
    return (base + slot).reshape(-1), equal.any(2).reshape(-1)
