"""Push-down rules: how a request for rows of an op's output becomes requests for its inputs.

Each rule is data in `RULES`: op -> function(puller, node, layout). It returns the value with only
the selected rows, or raises `Stop(reason)`: the push ends there, the op runs on all rows and the
rows are gathered afterwards (slower, never wrong). A new op is a new rule, not a new template.
Views, products and indexing have a file each; here is everything else.

    request  layer_norm(x [B, N, D]) rows idx  ->  layer_norm(x rows idx)    [B, n, D]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from .index_rules import INDEX_RULES, SPLITS, moved, part_start
from .layout import Layout, align, free, tags
from .product_rules import PRODUCT_RULES
from .rule_base import (
    Rule,
    Stop,
    argument,
    dims_argument,
    require_free,
    rest_in_full,
    shape_of,
)
from .view_rules import VIEW_RULES, VIEWS, view_back

if TYPE_CHECKING:
    from .pull import RowPuller

aten = torch.ops.aten


def pointwise(puller: RowPuller, node: Node, layout: Layout) -> Any:
    """Any op that works element by element, operands broadcast (right-aligned)."""

    def operand(value: Node) -> Any:
        if not isinstance(value.meta.get("val"), Tensor):
            return puller.full(value)
        return puller.operand(value, align(shape_of(value), layout), layout)

    args = torch.fx.map_arg(node.args, operand)
    kwargs = torch.fx.map_arg(node.kwargs, operand)
    return puller.call(node, args, kwargs)


def cast_like(puller: RowPuller, node: Node, layout: Layout) -> Any:
    """`x.type_as(other)`: only the dtype of `other` counts, whatever its shape."""
    rows = puller.pull(node.args[0], layout)
    dtype = node.meta["val"].dtype
    return puller.traced(node, lambda: rows.to(dtype))


def dropout(puller: RowPuller, node: Node, layout: Layout) -> Any:
    if argument(node, 2, "train") and argument(node, 1, "p"):
        raise Stop("dropout draws random numbers for all rows")
    return puller.pull(node.args[0], layout)


def over_free_dims(dims_of: Callable[[Node], list[int]], *, keep: bool) -> Rule:
    """Ops that mix elements along some dims only: softmax, norms, reductions, cumsum, roll.

    keep: the output has the input's dims; otherwise `keepdim` decides (reductions).
    """

    def rule(puller: RowPuller, node: Node, layout: Layout) -> Any:
        x = node.args[0]
        shape = shape_of(x)
        dims = sorted(d % len(shape) for d in dims_of(node)) or list(range(len(shape)))
        out = list(layout)
        if not keep and len(layout) != len(shape):
            for d in dims:
                out.insert(d, free(shape[d]))
        require_free(tuple(out), dims, str(node.target))
        for d in dims:
            out[d] = free(shape[d])
        return rest_in_full(puller, node, tuple(out))

    return rule


def normalized(puller: RowPuller, node: Node, layout: Layout) -> Any:
    """layer_norm and rms_norm; weight and bias may differ from row to row (experts)."""
    names = ("weight", "bias") if node.target is aten.layer_norm.default else ("weight",)
    sizes: Any = node.args[1]
    require_free(layout, range(-len(sizes), 0), str(node.target))
    rows = puller.pull(node.args[0], layout)
    affine = [argument(node, 2 + i, name) for i, name in enumerate(names)]
    eps = argument(node, 2 + len(names), "eps", 1e-5 if len(names) == 2 else None)
    whole = [puller.full(p) for p in affine]
    if all(p is None or isinstance(p, Tensor) for p in whole):
        return puller.call(node, (rows, sizes, *whole, eps), {})
    value = puller.call(node, (rows, sizes, *[None] * len(names), eps), {})
    for parameter, combine in zip(affine, (torch.mul, torch.add), strict=False):
        if parameter is not None:
            by_row = puller.operand(parameter, align(shape_of(parameter), layout), layout)
            value = puller.traced(node, partial(combine, value, by_row))
    return value


def _channel_dims(node: Node) -> list[int]:
    """group_norm mixes everything but the first dim."""
    return list(range(1, len(shape_of(node))))


def item_of_tuple(puller: RowPuller, node: Node, layout: Layout) -> Any:
    """getitem of a multi-output op: the producer is pushed once, in the layout of this part.

    A part of the token rows is not asked of the split, but of what it splits.
    """
    producer, part = cast(tuple[Node, int], node.args)
    if producer.target in SPLITS:
        source: Any = producer.args[0]
        dim = argument(producer, 2, "dim", 0) % len(layout)
        if tags(layout[dim]):
            begins = part_start(producer, part)
            assert begins is not None
            return puller.pull(source, moved(layout, dim, shape_of(source)[dim], begins))
    return puller.pull(producer, layout)[part]


# Composite ops without the pointwise tag that work element by element in inference.
POINTWISE = {
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.square.default,
    aten.floor_divide.default,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.where.Scalar,
    aten.masked_fill.Tensor,
    aten.complex.default,
    aten.polar.default,
    aten.real.default,
    aten.imag.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.hardswish.default,
    aten.log_sigmoid.default,
    aten.isclose.default,
    aten._conj.default,
    aten.conj.default,
    aten.resolve_conj.default,
    # second names of tagged ops
    aten.__and__.Tensor,
    aten.__and__.Scalar,
    aten.__or__.Tensor,
    aten.__or__.Scalar,
    aten.__xor__.Tensor,
    aten.__xor__.Scalar,
    aten.absolute.default,
    aten.negative.default,
    aten.special_expit.default,
    aten.subtract.Tensor,
    aten.subtract.Scalar,
    aten.multiply.Tensor,
    aten.multiply.Scalar,
    aten.divide.Tensor,
    aten.divide.Scalar,
    aten.true_divide.Scalar,
    aten.greater.Tensor,
    aten.greater.Scalar,
    aten.less.Tensor,
    aten.less.Scalar,
    aten.not_equal.Tensor,
    aten.not_equal.Scalar,
}
SECOND = dims_argument(1)
THIRD = dims_argument(2)
RULES: dict[Any, Rule] = {
    **VIEW_RULES,
    **PRODUCT_RULES,
    **INDEX_RULES,
    aten.type_as.default: cast_like,
    aten.to.other: cast_like,
    aten.dropout.default: dropout,
    aten.layer_norm.default: normalized,
    aten.rms_norm.default: normalized,
    aten.group_norm.default: over_free_dims(_channel_dims, keep=True),
    aten.softmax.int: over_free_dims(SECOND, keep=True),
    aten._softmax.default: over_free_dims(SECOND, keep=True),
    aten._safe_softmax.default: over_free_dims(SECOND, keep=True),
    aten.log_softmax.int: over_free_dims(SECOND, keep=True),
    aten.cumsum.default: over_free_dims(SECOND, keep=True),
    aten.cumprod.default: over_free_dims(SECOND, keep=True),
    aten.flip.default: over_free_dims(SECOND, keep=True),
    aten.roll.default: over_free_dims(THIRD, keep=True),
    aten.sum.dim_IntList: over_free_dims(SECOND, keep=False),
    aten.mean.dim: over_free_dims(SECOND, keep=False),
    aten.amax.default: over_free_dims(SECOND, keep=False),
    aten.amin.default: over_free_dims(SECOND, keep=False),
    aten.max.dim: over_free_dims(SECOND, keep=False),
    aten.min.dim: over_free_dims(SECOND, keep=False),
    aten.argmax.default: over_free_dims(SECOND, keep=False),
    aten.argmin.default: over_free_dims(SECOND, keep=False),
    aten.any.dim: over_free_dims(SECOND, keep=False),
    aten.all.dim: over_free_dims(SECOND, keep=False),
    aten.prod.dim_int: over_free_dims(SECOND, keep=False),
    aten.logsumexp.default: over_free_dims(SECOND, keep=False),
    aten.var.dim: over_free_dims(SECOND, keep=False),
    aten.var.correction: over_free_dims(SECOND, keep=False),
    aten.std.dim: over_free_dims(SECOND, keep=False),
    aten.std.correction: over_free_dims(SECOND, keep=False),
    aten.var_mean.dim: over_free_dims(SECOND, keep=False),
    aten.var_mean.correction: over_free_dims(SECOND, keep=False),
    aten.linalg_vector_norm.default: over_free_dims(THIRD, keep=False),
    aten.linalg_norm.default: over_free_dims(THIRD, keep=False),
    aten.norm.ScalarOpt_dim: over_free_dims(THIRD, keep=False),
}


def rule_for(target: Any) -> Rule | None:
    """The rule of an op; any op tagged pointwise has one; None: the push stops."""
    if target in RULES:
        return RULES[target]
    if getattr(target, "__name__", "") == "getitem":
        return item_of_tuple
    if target in POINTWISE:
        return pointwise
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return None  # a write in place: made functional before, or left alone
    random = torch.Tag.nondeterministic_seeded in target.tags
    return pointwise if torch.Tag.pointwise in target.tags and not random else None


__all__ = ["RULES", "VIEWS", "Rule", "Stop", "pointwise", "rule_for", "shape_of", "view_back"]
