"""Rows of several streams that meet in one attention: image tokens and text tokens, joined.

q = cat([q image, q text]); out = sdpa(q, k, v); image, text = split(out)
  a part of the output has token rows of its own       stream_parts
  the keys of those tokens are one part of a cat       Above.part_of_cat
  the other parts are computed whole, without the tokens' rows    WholeRows
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .dataflow import is_heavy
from .dry_run import DryRun, dry_pull
from .index_rules import JOINS, PARTS, SPLITS, part_start
from .layout import Layout, RowSpace, Selection, is_windowed, row_layout, tags
from .pull import RowPuller
from .region import RowRoot, StreamPart
from .rule_base import argument, shape_of
from .seen_ops import SeenOps


def stream_parts(whole: Node, space: RowSpace) -> tuple[StreamPart, ...]:
    """The parts along the tokens that `whole [B, M, ...]` is taken to; none if it is used whole."""
    nodes: list[tuple[Node, Node, int]] = []  # part, the op that takes it, its number there
    for user in whole.users:
        if user.target in SPLITS:
            nodes += [(u, user, u.args[1]) for u in user.users if u.target is getitem]  # type: ignore[misc]
        else:
            nodes.append((user, user, 0))
    found = []
    for node, taker, number in nodes:
        start = _taken_from(taker, number)
        if start is None:
            return ()
        part = RowSpace(space.samples, shape_of(node)[1])
        layout = row_layout(shape_of(node), part)
        if part.tokens == space.tokens or layout is None:
            return ()
        found.append(StreamPart(node, layout, part, start))
    return tuple(sorted(found, key=lambda p: p.start))


def _taken_from(taker: Node, number: int) -> int | None:
    if taker.target not in PARTS | SPLITS:
        return None
    position = 2 if taker.target in SPLITS else 1
    dim = argument(taker, position, "dim", 0)
    return part_start(taker, number) if dim in (1, 1 - len(shape_of(taker.args[0]))) else None


@dataclass(frozen=True)
class Limits:
    """Nodes that a search upward does not go beyond. near: these are enough for most attention.

    Without `near` every search would climb the residual stream to the first block: compile time
    that grows with the square of the depth.
    """

    near: frozenset[Node]
    far: frozenset[Node]


@dataclass(frozen=True)
class Above:
    """Looking upward from a value, no further than the nodes in `limit`, or in `far`."""

    space: RowSpace
    limit: frozenset[Node]
    far: frozenset[Node]

    def dry_pull(self, root: RowRoot) -> DryRun | None:
        """How far a request for rows of `root` gets."""
        return dry_pull([root], self.limit, self.space)

    def far_pull(self, root: RowRoot) -> DryRun | None:
        """The same where looking further may pay."""
        return dry_pull([root], self.far, self.space)

    def part_of_cat(self, root: RowRoot) -> RowRoot | None:
        """The one projection above `root` that has the requested rows alone, before a cat.

        Positions may be joined the same way; they are cheap, and no part to keep.
        """
        dry = self.dry_pull(root)
        pending, found, seen = [root.node], set[RowRoot](), {root.node}
        while dry is not None and pending:
            node = pending.pop()
            for source in node.all_input_nodes:
                layout = dry.requested.get(source)
                if layout is None or source in seen:
                    continue
                seen.add(source)
                if is_windowed(layout, self.space):
                    pending.append(source)
                elif node.target in JOINS and self._is_projected(RowRoot(source, layout)):
                    found.add(RowRoot(source, layout))
        return found.pop() if len(found) == 1 else None

    def _is_projected(self, part: RowRoot) -> bool:
        dry = self.dry_pull(part)
        return dry is not None and any(is_heavy(n) for n in dry.pulled)


class WholeRows(RowPuller):
    """All rows of one stream, computed without those of the others that share a value with it.

    `asked`: the nodes whose whole value this takes.
    """

    def __init__(self, part: StreamPart, full: Callable[[Node], Any]) -> None:
        flat = torch.arange(part.space.rows, device=part.node.meta["val"].device)
        everything = Selection(part.space, flat, part.space.tokens, per_sample=True)
        super().__init__(everything, full, lambda _: False)
        self.asked: set[Node] = set()
        self._part = part

    def rows(self) -> Tensor:
        """The part's value."""
        return super().pull(self._part.node, self._part.layout)

    def full(self, value: Any) -> Any:
        if isinstance(value, Node):
            self.asked.add(value)
        return super().full(value)

    def pull(self, node: Any, layout: Layout) -> Any:
        if tags(layout) and is_windowed(layout, self.selection.space):
            return super().pull(node, layout)
        return self.full(node)


def asked_by(part: StreamPart) -> set[Node]:
    """What is needed in full to compute the part with `WholeRows`."""
    value = part.node.meta["val"]
    with value.fake_mode, torch.no_grad(), SeenOps(value.fake_mode):
        puller = WholeRows(part, lambda n: n.meta["val"])
        puller.rows()
    return puller.asked
