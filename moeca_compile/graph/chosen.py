"""The canonical form of expert choice: a list of places, each one expert's output for one token.

What differs from token choice is the numbering only. A token has no fixed number of branches, so
they are listed: place r holds branch `token * E + expert`, in any order, no branch twice.

    chosen_experts(body, places [R], rows ([T, D],), params, groups, valid) -> [R, D]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from .experts import ExpertRows, inverse, num_experts_of, per_expert, sort_branches


@dataclass(frozen=True)
class Groups:
    """Which places were chosen together: `count` groups of equal size, one for each sample where
    experts choose within a sample, one where they choose from the whole batch.

    run: that many places in a row are of one group; R = outer * count * run.
    """

    count: int
    run: int

    def split(self, values: Tensor) -> Tensor:
        """[R] in the order of the places -> [count, R / count]."""
        return values.reshape(-1, self.count, self.run).transpose(0, 1).reshape(self.count, -1)

    def join(self, values: Tensor) -> Tensor:
        """The inverse of `split`."""
        return values.reshape(self.count, -1, self.run).transpose(0, 1).reshape(-1)

    def of_places(self, places: int) -> Tensor:
        """The group of each of `places` places."""
        return torch.arange(places) // self.run % self.count


def chosen_experts(
    body: GraphModule,
    places: Tensor,
    rows: Sequence[Tensor],
    params: Sequence[Any],
    groups: tuple[int, int],
    valid: Tensor | None = None,
) -> Tensor:
    """Outputs [R, D] of all places. Semantics of the node.

    places: [R], branch numbers token * E + expert; rows: each [T, ...]; groups: count and run of
    `Groups`; valid [R]: places that hold a branch at all, others give zeros; None: all of them.
    Raises Stop if the body is no row-wise function (refused when the node is made).
    """
    experts = num_experts_of(params)
    order, sorted_rows = sort_branches(places % experts, experts, valid)
    token = torch.div(places, experts, rounding_mode="floor").index_select(0, order)
    picked = [r.index_select(0, token) for r in rows]
    out = ExpertRows(body, picked, [per_expert(p) for p in params], sorted_rows).run()
    out = out.index_select(0, inverse(order))
    return out if valid is None else torch.where(valid.unsqueeze(-1), out, 0)
