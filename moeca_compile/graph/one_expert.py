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

from .branches import Branches, NotOneExpert, front_dims, narrowed, product_sides
from .layout import Layout, align, selected_shape, tags
from .pull import RowPuller
from .routing_ids import FLAT_VIEWS, IdsProbe, row_index
from .row_rules import Stop, rule_for, shape_of

aten = torch.ops.aten
PRODUCTS = {aten.bmm.default, aten.matmul.default, aten.baddbmm.default, aten.einsum.default}
TOKEN = frozenset("b")
WIDENING = {aten.expand.default, aten.repeat.default, aten.repeat_interleave.self_int}


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
    gathered from, None if computed from such nodes. inside: branch values that depend on these.
    products: the products met so far.
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
        self.products: set[Node] = set()
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
        if self._is_product(node):
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
        return self.leaves.value("param", node, one_expert_shape(node, layout, self.parametric))

    def token_rows(self, node: Node, own: Layout, result: Layout) -> Tensor:
        """Rows of a token value in layout `own`, shaped to combine with `result`."""
        rows = self.token_matrix(node, own)
        own = (((),) * (len(result) - len(own))) + own
        shape = []
        for mine, wanted in zip(own, result, strict=True):
            shape += selected_shape((wanted if tags(wanted) else mine,), self.selection)
        order = [f for dim in result for f in dim if f.tag or f.size != 1]
        if order[0].tag not in TOKEN:
            raise NotOneExpert("token rows meet branches that are not in the first dims", node)
        return self.shaped(node, rows, shape)

    def token_matrix(self, node: Node, own: Layout) -> Tensor:
        """Rows [R, D] of a value with tokens in front: the region's row input."""
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
        if (found := row_index(node)) is not None:
            source, index = found
            rank = len(shape_of(index))
            if tags(layout[rank:]):
                return None
            per_token = shape_of(source)[0] == self.branches.tokens
            if per_token and self.probe.role(index) == "token":
                return source, (self.branches.token_dim(), *layout[rank:])
            if self.branches.top_k > 1:
                raise NotOneExpert("row t * K + k is not the row of token t", node)
        if node.target not in WIDENING:
            return None
        narrow: Any = node.args[0]
        if self.branches.top_k == 1:  # nothing is repeated
            return (narrow, layout) if shape_of(narrow) == shape_of(node) else None
        own = narrowed(node, layout, shape_of(narrow))
        return (narrow, own) if own and tags(own) == TOKEN else None

    def product(self, node: Node, layout: Layout) -> Any:
        """bmm, matmul, baddbmm, einsum of rows and one expert's matrix -> linear or matmul."""
        sides = product_sides(node, layout)
        weights = [s for s in sides if s[0] in self.parametric]
        if len(sides) != 2 or len(weights) != 1:
            raise NotOneExpert("not a product of rows and one expert's parameter", node)
        self.products.add(node)
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
        shift = self.operand(added, align(shape_of(added), layout), layout)
        return self.traced(node, lambda: out + shift)

    def _shared(self, node: Node) -> Any:
        if node in self.inside or not isinstance(node.meta.get("val"), Tensor):
            raise NotOneExpert("an expert needs all of its rows at once", node)
        return self.leaves.value("shared", node, shape_of(node))

    def _is_product(self, node: Node) -> bool:
        parametric = any(n in self.parametric for n in node.all_input_nodes)
        return parametric and node.target in PRODUCTS

    def _is_special(self, node: Node) -> bool:
        if node in self.parametric or self._is_product(node):
            return True
        if node in self.inside:
            return False
        return self.branches.top_k == 1 or node.target in WIDENING or row_index(node) is not None


def one_expert_shape(node: Node, layout: Layout, parametric: dict[Node, Node | None]) -> list[int]:
    """The dims of one expert's value of a parameter that has the branches in front."""
    front = front_dims(layout)
    if front is None:
        raise NotOneExpert("a parameter's branches are not in the first dims", node)
    if (bank := parametric[node]) is not None:
        return shape_of(bank)[1:]
    inner = shape_of(node)[front:]
    while len(inner) > 2 and inner[0] == 1:  # [T, 1, O, I]: a slot dim of size one
        inner = inner[1:]
    return inner


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
