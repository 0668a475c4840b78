"""The push-down on fake rows: how far a request gets, before anything is rewritten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .layout import Layout, RowSpace, Selection
from .pull import RowPuller
from .row_rules import Stop

# Any count differing from common sizes works; the rows are fake.
DRY_ROWS = 3


@dataclass(frozen=True)
class DryRun:
    """What a request met. pulled: nodes evaluated on rows; stops: node -> reason; requested: layouts."""

    pulled: frozenset[Node]
    stops: dict[Node, str]
    requested: dict[Node, Layout]


def dry_pull(
    node: Node, layout: Layout, space: RowSpace, available: set[Node], *, per_sample: bool, rows: int = DRY_ROWS
) -> DryRun | None:
    """Request a few rows of `node`; None if not even gathering the whole value works."""
    fake_mode = node.meta["val"].fake_mode
    samples = space.samples if per_sample else 1
    with fake_mode, torch.no_grad():
        flat = torch.zeros(samples * rows, dtype=torch.int64, device=node.meta["val"].device)
        selection = Selection(space, flat, rows, per_sample)
        puller = RowPuller(selection, _value, lambda n: n in available)
        try:
            puller.pull(node, layout)
        except Stop:
            return None
    return DryRun(frozenset(puller.pulled), dict(puller.stops), dict(puller.met))


def _value(node: Node) -> Any:
    return node.meta["val"]
