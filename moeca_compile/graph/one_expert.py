"""A computation on all branches, folded to the graph of one expert on token rows.

The same push-down that selects rows finds the body: rows of the branch output are requested, and
the request climbs to the leaves, which become the body's inputs.

    W[ids] [T*K, F, D], b[ids] [T*K, F]    ->  one expert's W [F, D], b [F]
    x[arange(T*K) // K] [T*K, D]           ->  rows [R, D] of the tokens
    bmm(W[ids], x[..].unsqueeze(-1))       ->  linear(rows, W)

Anything else that differs from branch to branch (router weights, say) ends the body.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .layout import Factor, Layout, align, free, free_layout, selected_shape, tags
from .pull import RowPuller
from .routing_ids import FLAT_VIEWS, Branches, IdsProbe, row_index
from .row_rules import Stop, rule_for, shape_of
from .rule_base import argument

aten = torch.ops.aten
PRODUCTS = {aten.bmm.default, aten.matmul.default, aten.baddbmm.default, aten.einsum.default}
TOKEN = frozenset("b")
WIDENING = {aten.expand.default, aten.repeat.default, aten.repeat_interleave.self_int}


class NotOneExpert(Exception):
    """The computation is no function of token rows and one expert's parameters; why, and where."""

    def __init__(self, reason: str, node: Node):
        super().__init__(reason)
        self.reason = reason
        self.node = node


@dataclass
class Leaves:
    """The body's inputs by kind and node, in order of first use; `value` makes a missing one.

    rows: node of a token value, hole [R, D]; param: node whose dims behind the branches (behind E
    for a stacked parameter) are one expert's, hole of those dims; shared: whole value.
    """

    make: Callable[[Node, list[int]], Tensor]
    holes: dict[tuple[str, Node], Tensor] = field(default_factory=dict)
    only_rows: frozenset[Node] | None = None  # no other token rows may be added

    def value(self, kind: str, node: Node, shape: list[int]) -> Tensor:
        key = (kind, node)
        if key not in self.holes:
            if kind == "rows" and self.only_rows is not None and node not in self.only_rows:
                raise NotOneExpert("reads other rows than the experts do", node)
            self.holes[key] = self.make(node, shape)
        return self.holes[key]

    def of(self, kind: str) -> list[Node]:
        return [n for k, n in self.holes if k == kind]


def fake_hole(node: Node, shape: list[int]) -> Tensor:
    """A fake body input for a leaf, in the graph's fake mode."""
    value = node.meta["val"]
    with value.fake_mode:
        return torch.empty(shape, dtype=value.dtype, device=value.device)


class OneExpert(RowPuller):
    """Pulls branch values, in branch order, as values of one expert's rows [R = T, ...].

    parametric: nodes that are a function of the branch's expert alone -> the stacked node they were
    gathered from, None if computed from such nodes. inside: all that depends on these.
    """

    def __init__(
        self,
        branches: Branches,
        probe: IdsProbe,
        leaves: Leaves,
        parametric: dict[Node, Node | None],
        inside: set[Node],
    ):
        self.branches, self.probe, self.leaves = branches, probe, leaves
        self.parametric, self.inside = parametric, inside
        super().__init__(branches.selection(branches.tokens), self._shared, self._is_special)

    def root(self, node: Node, layout: Layout) -> Tensor:
        """The branch output as rows [R, D]."""
        if front_dims(layout) is None:
            raise NotOneExpert("the branches are not in the first dims", node)
        rows = self.pull(node, layout)
        return self.shaped(node, rows, [self.branches.tokens, rows.numel() // self.branches.tokens])

    def shaped(self, node: Node, value: Tensor, shape: list[int]) -> Tensor:
        if list(value.shape) == shape:
            return value
        return self.traced(node, lambda: value.reshape(shape))

    def pull(self, node: Node, layout: Layout) -> Any:
        if tags(layout) and tags(layout) != self.branches.tags:
            raise NotOneExpert("a value of the token or the slot alone", node)
        return super().pull(node, layout)

    def operand(self, node: Node, own: Layout, result: Layout) -> Any:
        present = tags(own)
        if not present:
            return self.full(node)
        if present == self.branches.tags:
            return self.pull(node, own)
        if present == TOKEN:
            return self.token_rows(node, own, result)
        raise NotOneExpert("differs from slot to slot, whatever the expert", node)

    def gather(self, node: Node, layout: Layout) -> Any:
        if node in self.stops:
            where = (
                "" if node in self.inside else "neither an expert's parameter nor a token's row: "
            )
            raise NotOneExpert(where + self.stops[node], node)
        if node in self.parametric:
            return self.param(node, layout)
        if node.target in PRODUCTS and node in self.inside:
            return self.product(node, layout)
        if (widened := self.widened(node, layout)) is not None:
            return self.token_rows(*widened, layout)
        if self.branches.top_k == 1 and node not in self.inside:
            return self.token_rows(node, layout, layout)
        return self.by_rule(node, layout)

    def by_rule(self, node: Node, layout: Layout) -> Any:
        rule = rule_for(node.target)
        if rule is None:
            raise NotOneExpert(f"no push-down rule for {node.target}", node)
        try:
            return rule(self, node, layout)
        except Stop as stop:
            raise NotOneExpert(stop.reason, node) from None

    def param(self, node: Node, layout: Layout) -> Tensor:
        """One expert's value of a parameter with the branches in front: its other dims."""
        front = front_dims(layout)
        if front is None:
            raise NotOneExpert("a parameter's branches are not in the first dims", node)
        return self.leaves.value("param", node, shape_of(node)[front:])

    def token_rows(self, node: Node, own: Layout, result: Layout) -> Tensor:
        """Rows of a token value in layout `own`, shaped to combine with `result`."""
        rows = self.token_matrix(node, own)
        own = (((),) * (len(result) - len(own))) + own
        shape = []
        for mine, wanted in zip(own, result, strict=True):
            shape += selected_shape((wanted if tags(wanted) else mine,), self.selection)
        if front_dims(result) is None:
            raise NotOneExpert("token rows meet branches that are not in the first dims", node)
        return self.shaped(node, rows, shape)

    def token_matrix(self, node: Node, own: Layout) -> Tensor:
        """Rows [R, D] of a value with tokens in front: the region's row input."""
        if node in self.inside:
            raise NotOneExpert("mixes the branches of a token", node)
        if front_dims(own) is None:
            raise NotOneExpert("token rows are not in the first dim", node)
        tokens = self.branches.tokens
        width = node.meta["val"].numel() // tokens
        source, above = node, node
        while shape_of(source) != [tokens, width] and above.target in FLAT_VIEWS:
            (above,) = above.all_input_nodes[:1]
            source = above if shape_of(above) == [tokens, width] else source
        return self.leaves.value("rows", source, [tokens, width])

    def matrix(self, node: Node, own: Layout) -> Tensor:
        """The rows' side of a product: [R, C], C the only dim besides the branches."""
        if tags(own) == TOKEN != self.branches.tags:
            return self.token_matrix(node, own)
        if tags(own) != self.branches.tags or front_dims(own) is None:
            raise NotOneExpert("a product's rows are not the branches", node)
        rows = self.pull(node, own)
        return self.shaped(node, rows, [self.branches.tokens, rows.numel() // self.branches.tokens])

    def widened(self, node: Node, layout: Layout) -> tuple[Node, Layout] | None:
        """(token value, its layout) if the node repeats each token's row for its K branches."""
        if node in self.inside:
            return None
        if (found := row_index(node)) is not None:
            source, index = found
            rank = len(shape_of(index))
            if tags(layout[rank:]) or shape_of(source)[0] != self.branches.tokens:
                return None
            if self.probe.role(index) == "token":
                return source, (self.branches.token_dim(), *layout[rank:])
            if self.branches.top_k > 1:
                raise NotOneExpert("row t * K + k is not the row of token t", node)
        if node.target not in WIDENING or self.branches.top_k == 1:
            return None
        narrow: Any = node.args[0]
        own = _narrowed(node, layout, shape_of(narrow))
        return (narrow, own) if own and tags(own) == TOKEN else None

    def product(self, node: Node, layout: Layout) -> Any:
        """bmm, matmul, baddbmm, einsum of rows and one expert's matrix -> linear or matmul."""
        if node.target is aten.einsum.default:
            sides = _einsum_sides(node, layout)
        else:
            sides = _product_sides(node, layout)
        weights = [s for s in sides if s[0] in self.parametric]
        if len(sides) != 2 or len(weights) != 1:
            raise NotOneExpert("not a product of rows and one expert's parameter", node)
        (weight, weight_own, contracted) = weights[0]
        (rows_node, rows_own, _) = next(s for s in sides if s[0] is not weight)
        w = self.pull(weight, weight_own)
        if w.dim() != 2:
            raise NotOneExpert("an expert's weight is no matrix", node)
        rows = self.matrix(rows_node, rows_own)
        if rows.shape[1] != w.shape[contracted]:
            raise NotOneExpert("several rows for each branch", node)
        out = self.traced(
            node, lambda: aten.linear(rows, w) if contracted == 1 else aten.matmul(rows, w)
        )
        if front_dims(layout) is None:
            raise NotOneExpert("a product whose branches are not in the first dims", node)
        out = self.shaped(node, out, selected_shape(layout, self.selection))
        if node.target is not aten.baddbmm.default:
            return out
        if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
            raise NotOneExpert("baddbmm with factors", node)
        added: Any = node.args[0]
        return out + self.operand(added, align(shape_of(added), layout), layout)

    def _shared(self, node: Node) -> Any:
        if node in self.inside or not isinstance(node.meta.get("val"), Tensor):
            raise NotOneExpert("an expert needs all of its rows at once", node)
        return self.leaves.value("shared", node, shape_of(node))

    def _is_special(self, node: Node) -> bool:
        if node in self.parametric:
            return True
        if node in self.inside:
            return node.target in PRODUCTS
        return self.branches.top_k == 1 or node.target in WIDENING or row_index(node) is not None


class StackedParameter(RowPuller):
    """Pulls a function of the branch's expert for all experts at once: [E, ...]."""

    def __init__(self, branches: Branches, banks: dict[Node, Tensor], experts: int):
        self._banks = banks
        super().__init__(branches.selection(experts), self._refuse, banks.__contains__)

    def gather(self, node: Node, layout: Layout) -> Any:
        if node not in self._banks:
            raise NotOneExpert(f"a parameter of the expert: {self.stops.get(node, '')}", node)
        return self._banks[node].reshape(selected_shape(layout, self.selection))

    def _refuse(self, node: Node) -> Any:
        raise NotOneExpert("a parameter that mixes experts", node)


def front_dims(layout: Layout) -> int | None:
    """How many dims hold the rows, all of them in front of any other; None if they are not."""
    tagged = [i for i, dim in enumerate(layout) if tags(dim)]
    count = tagged[-1] + 1 if tagged else 0
    inner = [f for dim in layout[:count] for f in dim if not f.tag and f.size != 1]
    return None if inner else count


def _narrowed(node: Node, layout: Layout, shape: list[int]) -> Layout | None:
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


def _product_sides(node: Node, layout: Layout) -> list[Side]:
    args: Any = node.args
    a, b = args[1:3] if node.target is aten.baddbmm.default else args[:2]
    a_shape, b_shape = shape_of(a), shape_of(b)
    if min(len(a_shape), len(b_shape)) < 2 or tags(layout[-2:]):
        raise NotOneExpert("a product over its branches", node)
    a_own = (*align(a_shape[:-2], layout[:-2]), *free_layout(a_shape[-2:]))
    b_own = (*align(b_shape[:-2], layout[:-2]), *free_layout(b_shape[-2:]))
    return [(a, a_own, 1), (b, b_own, 0)]


def _einsum_sides(node: Node, layout: Layout) -> list[Side]:
    equation = str(node.args[0]).replace(" ", "")
    if "." in equation or "->" not in equation:
        raise NotOneExpert("einsum with an ellipsis or without an explicit output", node)
    left, out = equation.split("->")
    dims = dict(zip(out, layout, strict=True))
    operands: Any = node.args[1]
    sides: list[Side] = []
    for letters, x in zip(left.split(","), operands, strict=True):
        own = tuple(dims.get(c, free(s)) for c, s in zip(letters, shape_of(x), strict=True))
        inner = [c for c, dim in zip(letters, own, strict=True) if not tags(dim)]
        contracted = [i for i, c in enumerate(inner) if c not in dims]
        if len(contracted) != 1 or len(set(letters)) != len(letters):
            raise NotOneExpert(f"einsum {equation} is no product of rows and a matrix", node)
        sides.append((x, own, contracted[0]))
    return sides
