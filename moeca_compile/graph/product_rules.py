"""Push-down through matrix products and attention.

request  linear(x [B, N, D], W) rows idx   ->  linear(x rows idx, W)                  [B, n, F]
request  sdpa(q, k, v) rows idx            ->  sdpa(q rows idx, all of k, all of v)
request  p [B, H, N, M] @ v [B, H, M, d]   ->  p rows idx @ all of v
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from .layout import Layout, align, free, tags
from .rule_base import Rule, Stop, argument, require_free, shape_of

if TYPE_CHECKING:
    from .pull import RowPuller

aten = torch.ops.aten
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def linear(puller: RowPuller, node: Node, layout: Layout) -> Any:
    require_free(layout, [-1], "a linear over its features")
    x: Any = node.args[0]
    weight: Any = node.args[1]
    rows = puller.pull(x, (*layout[:-1], free(shape_of(x)[-1])))
    return puller.linear(node, rows, weight, argument(node, 2, "bias"))


def addmm(puller: RowPuller, node: Node, layout: Layout) -> Any:
    """addmm and baddbmm: a product, and an operand that broadcasts to its result."""
    args: Any = node.args
    added, a, b = args[:3]
    first, second = _product_operands(puller, a, b, layout)
    shift = puller.operand(added, align(shape_of(added), layout), layout)
    return puller.call(node, (shift, first, second), dict(node.kwargs))


def matmul(puller: RowPuller, node: Node, layout: Layout) -> Any:
    """matmul, mm and bmm: rows in a batch dim or in the first operand's rows."""
    args: Any = node.args
    factors = _product_operands(puller, args[0], args[1], layout)
    return puller.call(node, factors, dict(node.kwargs))


def _product_operands(puller: RowPuller, a: Any, b: Any, layout: Layout) -> tuple[Any, Any]:
    a_shape, b_shape = shape_of(a), shape_of(b)
    if min(len(a_shape), len(b_shape)) < 2:
        raise Stop("a matrix-vector product")
    require_free(layout, [-1], "a product over its last dim")
    a_own = (*align(a_shape[:-2], layout[:-2]), layout[-2], free(a_shape[-1]))
    b_own = (*align(b_shape[:-2], layout[:-2]), free(b_shape[-2]), layout[-1])
    return _factor(puller, a, a_own, layout), _factor(puller, b, b_own, layout)


def _factor(puller: RowPuller, node: Node, own: Layout, result: Layout) -> Any:
    """A factor of a product with all of the result's row tags, none of them, or whole samples."""
    present = tags(own)
    if present == tags(result):
        return puller.pull(node, own)
    whole_samples = puller.selection.per_sample or puller.selection.space.samples == 1
    if not present or (present == {"b"} and whole_samples):
        return puller.full(node)
    raise Stop("an operand of a product has only a part of the row factors")


def einsum(puller: RowPuller, node: Node, layout: Layout) -> Any:
    """Any explicit equation; an ellipsis stands for the dims no letter names."""
    operands: Any = node.args[1]
    shapes = [shape_of(x) for x in operands]
    inputs, output = einsum_letters(str(node.args[0]), [len(s) for s in shapes], len(layout))
    dims = dict(zip(output, layout, strict=True))
    values = []
    for letters, x, shape in zip(inputs, operands, shapes, strict=True):
        own = []
        for letter, size in zip(letters, shape, strict=True):
            dim = dims.get(letter, free(size))
            broadcast = math.prod(f.size for f in dim) != size
            own.append(free(size) if broadcast else dim)
        if any(tags(dims.get(c, ())) and letters.count(c) > 1 for c in letters):
            raise Stop("einsum takes a diagonal of token rows")
        values.append(_factor(puller, x, tuple(own), layout))
    return puller.call(node, (node.args[0], values), {})


def einsum_letters(equation: str, ranks: list[int], out_rank: int) -> tuple[list[str], str]:
    """One letter per dim of every operand and of the output. Raises Stop where none is spelled."""
    if "->" not in equation:
        raise Stop("einsum without an explicit output")
    left, out = equation.replace(" ", "").split("->")
    spare = [c for c in LETTERS if c not in equation]

    def spelled(term: str, rank: int) -> str:
        if "..." not in term:
            return term
        missing = rank - len(term.replace("...", ""))
        return term.replace("...", "".join(spare[:10][10 - missing :]))

    inputs = [spelled(t, r) for t, r in zip(left.split(","), ranks, strict=True)]
    return inputs, spelled(out, out_rank)


def attention(puller: RowPuller, node: Node, layout: Layout) -> Any:
    """Query rows are pushed; keys and values stay whole (or come from their row caches).

    Where attention runs along another axis, rows are whole sequences and K and V are pushed too.
    """
    args: Any = node.args
    query, key, value = args[:3]
    if argument(node, 5, "is_causal", False):
        raise Stop("causal attention depends on the row's position among the queries")
    if argument(node, 4, "dropout_p", 0.0):
        raise Stop("attention with dropout")
    require_free(layout, [-1], "attention over its features")
    shapes = [shape_of(x) for x in (query, key, value)]
    batch = [_attention_batch(s[:-2], layout[:-2]) for s in shapes]
    keys = shapes[1][-2]
    rows = _factor(puller, query, (*batch[0], layout[-2], free(shapes[0][-1])), layout)
    k = _factor(puller, key, (*batch[1], free(keys), free(shapes[1][-1])), layout)
    v = _factor(puller, value, (*batch[2], free(keys), layout[-1]), layout)
    mask = argument(node, 3, "attn_mask")
    if isinstance(mask, Node):
        scores = (*layout[:-1], free(keys))
        mask = puller.operand(mask, align(shape_of(mask), scores), scores)
    kwargs = {n: v for n, v in node.kwargs.items() if n in ("scale", "enable_gqa")}
    return puller.call(node, (rows, k, v, mask), kwargs)


def _attention_batch(shape: list[int], batch: Layout) -> Layout:
    """Layout of an operand's batch dims; grouped heads are fewer than the query's."""
    own = align(shape, batch)
    for size, dim in zip(shape, batch[len(batch) - len(shape) :], strict=True):
        if tags(dim) and size not in (1, math.prod(f.size for f in dim)):
            raise Stop("grouped heads are merged with token rows")
    return own


PRODUCT_RULES: dict[Any, Rule] = {
    aten.linear.default: linear,
    aten.addmm.default: addmm,
    aten.baddbmm.default: addmm,
    aten.matmul.default: matmul,
    aten.mm.default: matmul,
    aten.bmm.default: matmul,
    aten.einsum.default: einsum,
    aten.scaled_dot_product_attention.default: attention,
}
