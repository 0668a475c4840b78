"""From the tokens that experts picked to the rows they are called on: which token is in which row.

    gates, picks = topk(scores [B, E, N], C)          one `top`, each expert C of N tokens
    flat[b * N + picks]              [R, D]           rows taken by number
    x.gather(1, picks[.., None])     [B, M, D]        ... within each sample
    einsum(one_hot(picks, N), x)     [B, E, C, D]     ... by a product with zeros and ones

All of them become row numbers in [0, T), one for each row picked, in the order of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .routing_ids import CASTS, FLAT_VIEWS, is_integer, row_index
from .row_rules import shape_of
from .rule_base import argument
from .view_rules import EXPANDS, PERMUTES

aten = torch.ops.aten
TOPS = {aten.topk.default}
ARITHMETIC = {
    aten.add.Tensor,
    aten.add.Scalar,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.select.int,
}
MOVED = {aten.to.device, aten.to.dtype_layout}
THROUGH = FLAT_VIEWS | CASTS | PERMUTES | EXPANDS | ARITHMETIC


class NotChoice(Exception):
    """The experts that pick tokens cannot be brought to the canonical form; why, and where."""

    def __init__(self, reason: str, node: Node):
        super().__init__(reason)
        self.reason = reason
        self.node = node


@dataclass(frozen=True)
class Top:
    """A `topk` over tokens: each expert picks `count` of `of`. picks: the node of their numbers."""

    node: Node
    picks: Node
    dim: int
    of: int
    count: Any  # int, or a size known only at run time


@dataclass(frozen=True)
class Dispatch:
    """Rows picked. picked: [.., Din]; rows: what was picked from, T rows of Din.

    numbers(value of `index`) -> [R] row numbers in [0, T), in the order of `picked`'s rows.
    """

    top: Top
    picked: Node
    rows: Node
    index: Node
    numbers: Callable[[Tensor], Tensor]

    @property
    def places(self) -> int:
        shape = shape_of(self.picked)
        return self.picked.meta["val"].numel() // shape[-1]

    @property
    def tokens(self) -> int:
        return self.rows.meta["val"].numel() // shape_of(self.rows)[-1]


def find_top(node: Node) -> Top | None:
    """A `topk` whose numbers are used, of the largest scores."""
    if node.target not in TOPS:
        return None
    args: Any = node.args
    sizes = shape_of(args[0])
    dim = argument(node, 2, "dim", -1) % max(1, len(sizes))
    getitems = [n for n in node.users if getattr(n.target, "__name__", "") == "getitem"]
    picks = next((n for n in getitems if n.args[1] == 1), None)
    if picks is None or not sizes:
        return None
    return Top(node, picks, dim, sizes[dim], args[1])


def find_dispatches(top: Top) -> list[Node]:
    """Nodes that pick rows of activations by the numbers, or make them zeros and ones."""
    found: list[Node] = []
    pending, seen = [top.picks], {top.picks}
    while pending:
        node = pending.pop()
        for user in node.users:
            if user.target is aten.one_hot.default or _takes_rows(user, node, top.of):
                found.append(user)
            elif user.target in THROUGH and is_integer(user) and user not in seen:
                seen.add(user)
                pending.append(user)
    order = {n: i for i, n in enumerate(top.node.graph.nodes)}
    return sorted(dict.fromkeys(found), key=order.__getitem__)


def _takes_rows(user: Node, index: Node, of: int) -> bool:
    found = row_index(user)
    if found is not None and found[1] is index:
        source = found[0]
    elif user.target is aten.gather.default and user.args[2] is index:
        source: Any = user.args[0]
        dim: Any = user.args[1]
        if dim in (-1, len(shape_of(source)) - 1):  # elements of each row, as router weights are
            return False
    else:
        return False
    if source.op == "placeholder" or not source.meta["val"].is_floating_point():
        return False
    sizes = shape_of(source)
    return of > 1 and len(sizes) > 1 and (sizes[0] % of == 0 or sizes[1] == of)


def dispatch_of(top: Top, node: Node) -> list[Dispatch]:
    """The rows picked at `node`, several where zeros and ones are multiplied more than once.

    Raises NotChoice.
    """
    if node.target is aten.one_hot.default:
        return _by_product(top, node)
    if node.target is aten.gather.default and len(shape_of(node)) == 3:
        return [_within_samples(top, node)]
    found = row_index(node)
    if found is None or len(shape_of(found[0])) != 2:
        raise NotChoice("rows are picked from other than [T, D]", node)
    return [Dispatch(top, node, found[0], found[1], lambda index: index.reshape(-1))]


def _within_samples(top: Top, node: Node) -> Dispatch:
    """x [B, N, D].gather(1, index [B, M, 1] widened to [B, M, D])."""
    source, dim, index = node.args[:3]
    samples, tokens, width = shape_of(source)
    narrow: Any = index
    if dim not in (1, -2) or narrow.target not in EXPANDS or shape_of(index)[-1] != width:
        raise NotChoice("gather takes other than whole rows", node)
    narrow = narrow.args[0]
    if shape_of(narrow)[-1] != 1 or shape_of(index)[0] != samples:
        raise NotChoice("gather takes other than whole rows", node)

    def numbers(value: Tensor) -> Tensor:
        first = torch.arange(samples, device=value.device).unsqueeze(1) * tokens
        return (value.reshape(-1, shape_of(index)[1]) + first).reshape(-1)

    return Dispatch(top, node, source, narrow, numbers)  # type: ignore[arg-type]


def _by_product(top: Top, one_hot: Node) -> list[Dispatch]:
    """Products of one_hot(picks, N) behind casts and views of the rest, with x."""
    source, classes = one_hot.args[:2]
    if classes != top.of:
        return []
    found: list[Dispatch] = []
    pending = [one_hot]
    while pending:
        node = pending.pop()
        for user in node.users:
            if user.target in CASTS | MOVED or (
                user.target in FLAT_VIEWS and shape_of(user)[-1] == top.of
            ):
                pending.append(user)
            elif (letters := _letters(user, node)) is not None:
                found.append(_product(top, user, node, source, letters))  # type: ignore[arg-type]
    return found


def _letters(node: Node, ones: Node) -> tuple[str, str, str, Node] | None:
    """(letters of the ones, of x, of the result, x) if `node` is ones times x over the tokens."""
    args: Any = node.args
    if node.target is aten.einsum.default and len(args[1]) == 2:
        equation = str(args[0]).replace(" ", "")
        if "." in equation or "->" not in equation:
            return None
        left, out = equation.split("->")
        sides = list(zip(left.split(","), args[1], strict=True))
        if sides[1][1] is ones:
            sides.reverse()
        (mine, first), (its, x) = sides
        if first is not ones or x is ones:
            return None
    elif node.target in (aten.bmm.default, aten.matmul.default) and args[0] is ones:
        rank = len(shape_of(ones))
        mine, its, out, x = "bmn"[3 - rank :], "bnd"[3 - rank :], "bmd"[3 - rank :], args[1]
        if rank not in (2, 3) or len(shape_of(x)) != rank:
            return None
    else:
        return None
    token, width = mine[-1], out[-1]
    batch = its[:-2]
    right = its[-2:] == token + width and token not in out and len(batch) < 2
    right = right and set(out[:-1]) == set(mine[:-1]) and width not in mine
    return (mine, its, out, x) if right and set(batch) <= set(out) else None


def _product(
    top: Top, node: Node, ones: Node, picks: Node, letters: tuple[str, str, str, Node]
) -> Dispatch:
    mine, its, out, x = letters
    sizes = shape_of(ones)[:-1]
    order = [mine.index(c) for c in out[:-1]]
    batch = out.index(its[0]) if len(its) == 3 else None

    def numbers(value: Tensor) -> Tensor:
        picked = value.reshape(sizes).permute(order)
        if batch is not None:
            shape = [-1 if i == batch else 1 for i in range(picked.dim())]
            first = torch.arange(picked.shape[batch], device=value.device) * top.of
            picked = picked + first.reshape(shape)
        return picked.reshape(-1)

    return Dispatch(top, node, x, picks, numbers)
