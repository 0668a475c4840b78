"""Expert choice: experts that pick their tokens. Recognised and reported; computed as written.

    gates, picks = topk(scores [.., E, N], C)        each expert picks C of N tokens
    x[picks] or one_hot(picks, N)                    the tokens' rows go to the expert

A cached branch is one of the K places of a token, and here a token has no fixed number of them.
Where the experts pick among the tokens of all samples, a sample's routing depends on the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..graph.dataflow import ancestors, descendants, is_heavy
from ..graph.region import NoMatch, module_path
from ..graph.routing_ids import CASTS, FLAT_VIEWS, is_integer, row_index
from ..graph.row_rules import shape_of
from ..graph.view_rules import EXPANDS, PERMUTES
from .base import PassReport

aten = torch.ops.aten
_TOP = {aten.topk.default}
_ARITHMETIC = {
    aten.add.Tensor,
    aten.add.Scalar,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.select.int,
}
_THROUGH = FLAT_VIEWS | CASTS | PERMUTES | EXPANDS | _ARITHMETIC
_MERGES = {aten.reshape.default, aten.view.default, aten.flatten.using_ints}


@dataclass(frozen=True)
class FindExpertChoice:
    """Report layers in which experts choose tokens; the graph is not changed."""

    name: str = "find_expert_choice"

    def run(self, gm: GraphModule) -> PassReport:
        missed: dict[str, NoMatch] = {}
        for node in gm.graph.nodes:
            if node.target in _TOP and _picks_rows(node):
                name = module_path(node)
                missed.setdefault(name, NoMatch("moe", name, _reason(node), node))
        return PassReport(self.name, 0, tuple(missed.values()))


def _picks_rows(top: Node) -> bool:
    """Whether the numbers a `topk` gives pick rows of activations that go into matrix products."""
    sizes, dim = shape_of(top.args[0]), _dim(top)
    rows = sizes[dim] if sizes else 0
    picks = [n for n in top.users if getattr(n.target, "__name__", "") == "getitem" and _second(n)]
    pending, seen = list(picks), set(picks)
    while pending:
        node = pending.pop()
        for user in node.users:
            if _gathers(user, node, rows):
                return any(is_heavy(n) or _grouped(n) for n in descendants(user))
            if user.target in _THROUGH and is_integer(user) and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def _gathers(user: Node, picks: Node, rows: int) -> bool:
    """`x[picks]` of activations, or `one_hot(picks, N)`."""
    if user.target is aten.one_hot.default:
        return user.args[1:2] == (rows,)
    found = row_index(user)
    if found is None or found[1] is not picks or not found[0].meta["val"].is_floating_point():
        return False
    source: Any = found[0]
    if source.op == "placeholder" or len(shape_of(source)) < 2:
        return False
    return rows > 1 and shape_of(source)[0] % rows == 0


def _reason(top: Node) -> str:
    rows, count = shape_of(top.args[0])[_dim(top)], top.args[1]
    picked = count if isinstance(count, int) else "a number, known at run time only,"
    samples = _merged_samples(top, rows)
    if samples:
        return (
            f"expert choice among the tokens of all {samples} samples: each expert picks {picked} "
            f"of {rows} rows, and one sample's routing depends on the others; computed as written"
        )
    return (
        f"expert choice: each expert picks {picked} of {rows} tokens, so a token has no fixed "
        "number of branches; computed as written"
    )


def _merged_samples(top: Node, rows: int) -> int:
    """How many samples were flattened into the rows that are chosen from, 0 if none."""
    for node in ancestors([top]):
        if node.target not in _MERGES:
            continue
        old, new = shape_of(node.args[0]), shape_of(node)
        if len(old) > 2 and old[0] > 1 and new[:1] == [rows] and old[0] * old[1] == rows:
            return old[0]
    return 0


def _dim(top: Node) -> int:
    args: Any = top.args
    dim: Any = args[2] if len(args) > 2 else top.kwargs.get("dim", -1)
    return int(dim) % max(1, len(shape_of(top.args[0])))


def _second(node: Node) -> bool:
    return bool(node.args[1] == 1)


def _grouped(node: Node) -> bool:
    return node.target is aten._grouped_mm.default
