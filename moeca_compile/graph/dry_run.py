"""The push-down on fake rows: how far a request gets, before anything is rewritten."""

from __future__ import annotations

from collections.abc import Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.fx import Node

from .layout import Layout, RowSpace, Selection
from .pull import RowPuller
from .region import RowRoot
from .row_rules import Stop
from .seen_ops import SeenOps

# Any count differing from common sizes works; the rows are fake.
DRY_ROWS = 3


@dataclass(frozen=True)
class DryRun:
    """What a request met.

    pulled: nodes evaluated on rows; stops: node -> reason; requested: node -> layout of its rows.
    """

    pulled: frozenset[Node]
    stops: dict[Node, str]
    requested: dict[Node, Layout]


def dry_pull(
    roots: Sequence[RowRoot],
    available: Set[Node],
    space: RowSpace,
    *,
    rows: int = DRY_ROWS,
    every_op: bool = False,
) -> DryRun | None:
    """Request `rows` rows per sample of every root; None if not even gathering all of it works.

    A root that is pulled serves the ones after it in full, as it will from its cache. every_op:
    run every op, for somebody who counts them.
    """
    value = roots[0].node.meta["val"]
    seen = nullcontext() if every_op else SeenOps(value.fake_mode)
    with value.fake_mode, torch.no_grad(), seen:
        flat = torch.zeros(space.samples * rows, dtype=torch.int64, device=value.device)
        selection = Selection(space, flat, rows, per_sample=True)
        puller = RowPuller(selection, lambda n: n.meta["val"], available.__contains__)
        try:
            for root in roots:
                puller.pull(root.node, root.layout)
        except Stop:
            return None
    return DryRun(frozenset(puller.pulled), dict(puller.stops), dict(puller.met))
