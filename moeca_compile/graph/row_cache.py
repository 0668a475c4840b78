"""One primitive for all that is cached by token row: attention, K, V, shared-expert output.

A cached value is stored with one row per token, contiguous, whatever shape the graph gives it, so
writing n rows costs O(n); reading it back is a view.

    value [B, H, N, d]  <->  cache [B * N + 1, H * d]     the last row takes writes of padding
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .layout import RowSpace, Selection
from .region import RowRoot


@dataclass(frozen=True)
class RowCache:
    """How the rows of `root` are stored in the cache tensor called `name`.

    times: the tensor that says when each row was written, where rows are extrapolated.
    """

    name: str
    root: RowRoot
    space: RowSpace
    times: str = ""

    @property
    def width(self) -> int:
        """Elements per row."""
        return math.prod(self._rest_sizes())

    def to_rows(self, value: Tensor, selection: Selection | None = None) -> Tensor:
        """A value in the root's layout (all rows, or the selected ones) -> [R, width]."""
        sizes = selection.sizes if selection else {"b": self.space.samples, "n": self.space.tokens}
        split: list[Any] = [sizes[f.tag] if f.tag else f.size for f in self._factors()]
        rows = sizes["b"] * sizes["n"]
        return value.reshape(split).permute(self._order()).reshape(rows, self.width)

    def from_rows(self, rows: Tensor) -> Tensor:
        """All rows [B * N, width], in whatever dtype they were stored -> the root's value."""
        order = self._order()
        lead = [self._factors()[i].size for i in order[: len(order) - len(self._rest_sizes())]]
        back = [order.index(i) for i in range(len(order))]
        value = rows.reshape(lead + self._rest_sizes()).permute(back)
        whole = self.root.node.meta["val"]
        return value.reshape(whole.shape).to(whole.dtype)

    def _factors(self) -> list[Any]:
        return [f for dim in self.root.layout for f in dim]

    def _order(self) -> list[int]:
        factors = self._factors()
        lead = [i for t in ("b", "n") for i, f in enumerate(factors) if f.tag == t]
        return lead + [i for i, f in enumerate(factors) if f.tag is None]

    def _rest_sizes(self) -> list[int]:
        return [f.size for f in self._factors() if f.tag is None]


def padded_index(selection: Selection, valid: Tensor) -> Tensor:
    """Write index [R] of the selected rows; padding goes to the row behind the last."""
    return torch.where(valid.reshape(-1), selection.flat, selection.space.rows)
