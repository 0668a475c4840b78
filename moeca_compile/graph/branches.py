"""Branches (token, slot) as rows: where they are in a tensor, and in the operands of an op.

[T * K, D]      (token, slot) (D,)         flat, the usual form
[T, K, D]       (token,) (slot,) (D,)      slots kept apart
[T, 1, D]       (token,) () (D,)           a token's value, for all of its branches
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .layout import Dim, Factor, Layout, RowSpace, Selection, align, free, free_layout, tags
from .row_rules import shape_of
from .rule_base import argument

aten = torch.ops.aten


class NotOneExpert(Exception):
    """The computation is no function of token rows and one expert's parameters; why, and where."""

    def __init__(self, reason: str, node: Node):
        super().__init__(reason)
        self.reason = reason
        self.node = node


class OneSlot(Selection):
    """Rows of branches: a dim of tokens has `count` rows, a dim of slots one."""

    @property
    def sizes(self) -> dict[str, Any]:
        return {"b": self.count, "n": 1}


@dataclass(frozen=True)
class Branches:
    """T x K branches. ids: a node whose elements in row-major order are branch t * K + k."""

    ids: Node
    tokens: int
    top_k: int

    @property
    def count(self) -> int:
        return self.tokens * self.top_k

    @property
    def tags(self) -> frozenset[str]:
        """Row tags of a branch value: "b" for its token and, if there are several, "n" its slot."""
        return frozenset("b" if self.top_k == 1 else "bn")

    def token_dim(self) -> Dim:
        return (Factor(self.tokens, "b"),)

    def selection(self, rows: int) -> Selection:
        """`rows` values instead of T * K, as tokens with one slot."""
        ids = self.ids.meta["val"]
        with ids.fake_mode:
            nothing = torch.empty(0, dtype=torch.int64, device=ids.device)
        return OneSlot(RowSpace(self.tokens, self.top_k), nothing, rows, per_sample=False)

    def layout(self, shape: Sequence[int]) -> Layout | None:
        """Branches in front of `shape`: [T, K, ...] or [T * K, ...]; None if they are not."""
        front: Layout | None = None
        if self.top_k == 1:
            front = (self.token_dim(),) if shape and shape[0] == self.tokens else None
        elif len(shape) > 1 and (shape[0], shape[1]) == (self.tokens, self.top_k):
            front = (self.token_dim(), (Factor(self.top_k, "n"),))
        elif shape and shape[0] == self.count:
            front = ((*self.token_dim(), Factor(self.top_k, "n")),)
        return None if front is None else (*front, *free_layout(shape[len(front) :]))


def front_dims(layout: Layout) -> int | None:
    """How many dims hold the rows, all of them in front of any other; None if they are not."""
    tagged = [i for i, dim in enumerate(layout) if tags(dim)]
    count = tagged[-1] + 1 if tagged else 0
    inner = [f for dim in layout[:count] for f in dim if not f.tag and f.size != 1]
    return None if inner else count


def narrowed(node: Node, layout: Layout, shape: list[int]) -> Layout | None:
    """The layout of what expand, repeat or repeat_interleave widened over the slots."""
    if node.target is aten.expand.default:
        return align(shape, layout)
    args: Any = node.args
    times: dict[int, int] = {}
    if node.target is aten.repeat.default and len(args[1]) == len(shape):
        times = {d: r for d, r in enumerate(args[1]) if r != 1}
    elif node.target is aten.repeat_interleave.self_int:
        dim = argument(node, 2, "dim")
        times = {} if dim is None else {dim % len(shape): args[1]}
    if len(times) != 1:
        return None
    ((dim, count),) = times.items()
    # Each element repeated: the slot is the dim's last factor; the dim repeated: its first.
    at = 0 if node.target is aten.repeat.default else -1
    slot = Factor(count, "n")
    if not layout[dim] or layout[dim][at] != slot:
        return None
    return (*layout[:dim], tuple(f for f in layout[dim] if f != slot), *layout[dim + 1 :])


Side = tuple[Node, Layout, int]  # operand, its layout, which of its matrix dims is contracted


def product_sides(node: Node, layout: Layout) -> list[Side]:
    """Both operands of bmm, matmul, baddbmm or einsum. Raises NotOneExpert."""
    if node.target is aten.einsum.default:
        return einsum_sides(node, layout)
    args: Any = node.args
    a, b = args[1:3] if node.target is aten.baddbmm.default else args[:2]
    a_shape, b_shape = shape_of(a), shape_of(b)
    if min(len(a_shape), len(b_shape)) < 2 or tags(layout[-2:]):
        raise NotOneExpert("a product over its branches", node)
    a_own = (*align(a_shape[:-2], layout[:-2]), *free_layout(a_shape[-2:]))
    b_own = (*align(b_shape[:-2], layout[:-2]), *free_layout(b_shape[-2:]))
    return [(a, a_own, 1), (b, b_own, 0)]


def einsum_sides(node: Node, layout: Layout) -> list[Side]:
    equation = str(node.args[0]).replace(" ", "")
    if "." in equation or "->" not in equation:
        raise NotOneExpert("einsum with an ellipsis or without an explicit output", node)
    left, out = equation.split("->")
    dims = dict(zip(out, layout, strict=True))
    operands: Any = node.args[1]
    sides: list[Side] = []
    summed: set[str] = set()
    for letters, x in zip(left.split(","), operands, strict=True):
        own = tuple(dims.get(c, free(s)) for c, s in zip(letters, shape_of(x), strict=True))
        inner = [c for c, dim in zip(letters, own, strict=True) if not tags(dim)][-2:]
        contracted = [i for i, c in enumerate(inner) if c not in dims]
        if len(contracted) != 1 or len(set(letters)) != len(letters):
            raise NotOneExpert(f"einsum {equation} is no product of rows and a matrix", node)
        sides.append((x, own, contracted[0]))
        summed.add(inner[contracted[0]])
    if len(summed) != 1:
        raise NotOneExpert(f"einsum {equation} sums its operands apart", node)
    return sides
