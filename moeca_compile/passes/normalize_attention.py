"""Attention written with einsum -> the same products as matmul.

The matcher knows softmax between two products `rows @ columns`; an equation may name and order its
dims in any way. Only the two einsums around a softmax are rewritten, and only beside experts:
attention alone is not cached.

    before:  s = einsum("bqhd,bkhd->bhqk", q, k)     o = einsum("bhqk,bkhd->bqhd", softmax(s), v)
    after:   s = q.permute(0, 2, 1, 3) [B, H, N, d] @ k.permute(0, 2, 3, 1) [B, H, d, N]
             o = (softmax(s) @ v.permute(0, 2, 1, 3)).permute(0, 2, 1, 3) [B, N, H, d]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..graph.attention import PRODUCTS, SOFTMAX, softmax_products
from ..graph.chosen import chosen_experts
from ..graph.experts import routed_experts
from ..graph.lift_branches import inline, trace_part
from ..graph.product_rules import einsum_letters
from ..graph.region import NoMatch, module_path
from ..graph.row_rules import Stop, shape_of
from .base import PassReport
from .normalize_gathered import is_bank

aten = torch.ops.aten
EINSUM = aten.einsum.default
EXPERTS = {routed_experts, chosen_experts}


@dataclass(frozen=True)
class Product:
    """What an einsum computes: (left.permute(..) @ right.permute(..)).permute(out)."""

    node: Node
    left: Node
    right: Node
    left_dims: tuple[int, ...]
    right_dims: tuple[int, ...]
    out_dims: tuple[int, ...]


@dataclass(frozen=True)
class NormalizeAttention:
    """Replace the einsums around a softmax by products, or say why not."""

    name: str = "normalize_attention"

    def run(self, gm: GraphModule) -> PassReport:
        missed, changed = [], 0
        if not any(n.target in EXPERTS for n in gm.graph.nodes):
            return PassReport(self.name, 0)
        for softmax in [n for n in gm.graph.nodes if n.target in SOFTMAX]:
            found = match_products(softmax)
            if isinstance(found, NoMatch):
                missed.append(found)
                continue
            for product in found:
                _replace(gm, product)
            changed += bool(found)
        if changed:
            gm.graph.lint()
            gm.recompile()
        return PassReport(self.name, changed, tuple(missed))


def match_products(softmax: Node) -> tuple[Product, ...] | NoMatch:
    """The einsums among the two products around a softmax; empty where there is no attention."""
    around = softmax_products(softmax, PRODUCTS | {EINSUM})
    if around is None:
        return ()
    scores, core = around
    if EINSUM not in (scores.target, core.target) or any(map(is_bank, scores.all_input_nodes)):
        return ()  # rows times a parameter are the logits of a router
    rank = len(shape_of(softmax))
    if softmax.args[1] not in (-1, rank - 1):
        return _miss(softmax, "a softmax that is not over the last dim")
    found = []
    for node, weights in ((scores, None), (core, _weights_of(core, softmax))):
        if node.target is not EINSUM:
            continue
        product = match_product(node, weights)
        if isinstance(product, NoMatch):
            return product
        found.append(product)
    return tuple(found)


def match_product(node: Node, left: Node | None) -> Product | NoMatch:
    """The einsum as a product of rows and columns. left: the operand that has the rows.

    None: the one that has the last dim but one of the result, which then stays in its order.
    """
    operands: list[Node] = list(node.args[1])  # type: ignore[arg-type]
    equation, rank = str(node.args[0]), len(shape_of(node))
    try:
        inputs, out = einsum_letters(equation, [len(shape_of(x)) for x in operands], rank)
    except Stop as stop:
        return _miss(node, stop.reason)
    if len(operands) != 2 or not _all_distinct([*inputs, out]) or not _same_sizes(operands, inputs):
        return _miss(node, f"einsum {equation} is no product of two operands")
    first = operands[0] is left if left is not None else rank > 1 and out[-2] in inputs[0]
    rows, columns = inputs if first else inputs[::-1]
    batch = "".join(c for c in out if c in rows and c in columns)
    row, column, summed = _only(rows, out, columns), _only(columns, out, rows), set(rows) - set(out)
    shared = summed == set(columns) - set(out)
    if not (len(row) == len(column) == len(summed) == 1 and shared):
        return _miss(node, f"einsum {equation} is no product of rows and columns")
    (inner,) = summed
    product = batch + row + column
    if left is None and product != out:
        return _miss(node, f"einsum {equation} gives no scores [..., queries, keys]")
    return Product(
        node,
        operands[0 if first else 1],
        operands[1 if first else 0],
        tuple(rows.index(c) for c in batch + row + inner),
        tuple(columns.index(c) for c in batch + inner + column),
        tuple(product.index(c) for c in out),
    )


def _weights_of(core: Node, softmax: Node) -> Node | None:
    """The operand of the core that the softmax has become."""
    node = softmax
    while core not in node.users:
        (node,) = node.users
    return node


def _only(letters: str, out: str, others: str) -> str:
    """The letters of one operand alone that are dims of the result."""
    return "".join(c for c in letters if c in out and c not in others)


def _all_distinct(terms: list[str]) -> bool:
    return all(len(set(term)) == len(term) for term in terms)


def _same_sizes(operands: list[Node], inputs: list[str]) -> bool:
    """Whether no dim is broadcast."""
    sizes: dict[str, int] = {}
    named = [p for x, term in zip(operands, inputs) for p in zip(term, shape_of(x), strict=True)]
    return all(sizes.setdefault(letter, size) == size for letter, size in named)


def _miss(node: Node, reason: str) -> NoMatch:
    return NoMatch("attention", module_path(node), reason, node)


def _replace(gm: GraphModule, product: Product) -> None:
    node = product.node

    def run(left: Tensor, right: Tensor) -> tuple[Tensor]:
        out = torch.matmul(_permuted(left, product.left_dims), _permuted(right, product.right_dims))
        return (_permuted(out, product.out_dims),)

    values = [product.left.meta["val"], product.right.meta["val"]]
    before = set(gm.graph.nodes)
    with gm.graph.inserting_before(node):
        part = trace_part(run, values, values[0].fake_mode)
        (new,) = inline(gm, part, [product.left, product.right])
    for made in set(gm.graph.nodes) - before:
        made.meta = {**node.meta, "val": made.meta["val"]}
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def _permuted(value: Tensor, dims: tuple[int, ...]) -> Tensor:
    return value if dims == tuple(range(len(dims))) else value.permute(dims)
