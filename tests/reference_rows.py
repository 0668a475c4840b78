"""Rows of the reference with a slope: a row's last two values give the line it is read along.

rows.at(now)                              value + slope * (now - time)
rows.updated(mask, fresh, now, same)      where mask: fresh, and (fresh - value) / (now - time)

T rows in any shape; `time` and masks have one entry a row and are stretched over the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Value when last written, slope, time [rows] of that write. order: 0 holds the value."""

    value: Tensor
    slope: Tensor
    time: Tensor
    order: int

    @classmethod
    def new(cls, value: Tensor, rows: int, now: float, order: int) -> Rows:
        """All rows written at `now`, nothing known from before. rows: how many leading dims."""
        time = torch.full(value.shape[:rows], now, dtype=value.dtype)
        return cls(value, torch.zeros_like(value), time, order)

    def at(self, now: float) -> Tensor:
        """As it is read at `now`."""
        if self.order == 0:
            return self.value
        return self.value + self.slope * stretched(now - self.time, self.value)

    def updated(self, mask: Tensor, fresh: Tensor, now: float, same: Tensor | None = None) -> Rows:
        """Rows in `mask` take `fresh`; `same` marks those that go on with what was there."""
        passed = now - self.time
        usable = passed != 0
        if same is not None:
            usable = usable & same
        slope = (fresh - self.value) / stretched(torch.where(usable, passed, 1.0), fresh)
        slope = torch.where(stretched(usable, fresh), slope, 0.0)
        every = stretched(mask, fresh)
        return Rows(
            torch.where(every, fresh, self.value),
            torch.where(every, slope, self.slope),
            torch.where(mask, now, self.time),
            self.order,
        )

    def picked(self, slot: Tensor) -> Rows:
        """Branches of `slot [T, K]` in the place of 0 .. K - 1."""
        wide = slot.unsqueeze(-1).expand_as(self.value)
        values = (self.value.gather(1, wide), self.slope.gather(1, wide))
        return Rows(*values, self.time.gather(1, slot), self.order)


def stretched(per_row: Tensor, like: Tensor) -> Tensor:
    """`per_row` with dims of size 1 behind it, as many as `like` has more."""
    return per_row.reshape(*per_row.shape, *[1] * (like.dim() - per_row.dim()))


def cached_slots(slot_ids: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(slot [T, K], same [T, K]): where each of `ids [T, K]` is cached, and whether it is."""
    slot, same = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for token, (cached, current) in enumerate(zip(slot_ids.tolist(), ids.tolist())):
        for k, expert in enumerate(current):
            same[token, k] = expert in cached
            slot[token, k] = cached.index(expert) if expert in cached else 0
    return slot, same
