"""Push-down rules: how a request for rows of an op's output becomes requests for its inputs.

Each rule is data in `RULES`: op -> function(puller, node, layout). It returns the value with only
the selected rows, or raises `Stop(reason)`: the push ends there, the op runs on all rows and the
rows are gathered afterwards (slower, never wrong). A new op is a new rule, not a new template.

    request  linear(x [B, N, D], W) rows idx  ->  linear(request x rows idx, W)   [B, n, F]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from .layout import Dim, Factor, Layout, align, free, free_layout, recut, selected_shape, tags

if TYPE_CHECKING:
    from .pull import RowPuller

aten = torch.ops.aten


class Stop(Exception):
    """The push-down cannot pass this node; `reason` says why."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


Rule = Callable[["RowPuller", Node, Layout], Any]


def shape_of(node: Any) -> list[int]:
    return [int(s) for s in node.meta["val"].shape]


def is_free(layout: Layout, dims: Sequence[int]) -> bool:
    return all(not tags(layout[d]) for d in dims)


def require_free(layout: Layout, dims: Sequence[int], what: str) -> None:
    if not is_free(layout, dims):
        raise Stop(f"{what} mixes token rows")


def _as_list(dims: int | Sequence[int]) -> list[int]:
    return [dims] if isinstance(dims, int) else list(dims)


def pointwise(puller: RowPuller, node: Node, layout: Layout) -> Any:
    """Any op that works element by element, operands broadcast (right-aligned)."""

    def operand(value: Any) -> Any:
        if not isinstance(value, Node) or not isinstance(value.meta.get("val"), Tensor):
            return puller.full(value) if isinstance(value, Node) else value
        return puller.operand(value, align(shape_of(value), layout), layout)

    args = torch.fx.map_arg(node.args, operand)
    kwargs = torch.fx.map_arg(node.kwargs, operand)
    return puller.call(node, args, kwargs)


def linear(puller: RowPuller, node: Node, layout: Layout) -> Any:
    require_free(layout, [-1], "a linear over its features")
    x, weight = node.args[0], node.args[1]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    rows = puller.pull(x, (*layout[:-1], free(shape_of(x)[-1])))
    return puller.linear(node, rows, weight, bias)


def addmm(puller: RowPuller, node: Node, layout: Layout) -> Any:
    require_free(layout, [-1], "addmm over its features")
    bias, x, weight = node.args[:3]
    rows = puller.pull(x, (layout[0], free(shape_of(x)[1])))
    added = puller.operand(bias, align(shape_of(bias), layout), layout)
    return puller.call(node, (added, rows, puller.full(weight)), dict(node.kwargs))


def over_free_dims(dims_of: Callable[[Node], list[int]], *, keep: bool) -> Rule:
    """Ops that mix elements along some dims only: softmax, norms, reductions, cumsum, sort.

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
        for d in dims:
            if tags(out[d]):
                raise Stop(f"{node.target} mixes token rows")
            out[d] = free(shape[d])
        rows = puller.pull(x, tuple(out))
        rest = torch.fx.map_arg(node.args[1:], puller.full)
        return puller.call(node, (rows, *rest), torch.fx.map_arg(node.kwargs, puller.full))

    return rule


def _dim_arg(position: int, default: Any = None) -> Callable[[Node], list[int]]:
    def dims(node: Node) -> list[int]:
        value = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
        return [] if value is None else _as_list(value)  # type: ignore[arg-type]

    return dims


def _normalized_dims(node: Node) -> list[int]:
    return [-1 - i for i in range(len(node.args[1]))]  # type: ignore[arg-type]


def view_back(node: Node, layout: Layout) -> Layout:
    """The layout of a view-like node's input. Raises Stop where rows would be cut."""
    source = node.args[0]
    shape = shape_of(source)
    rank = len(shape)
    target, args = node.target, node.args
    if target in RESHAPES:
        found = recut(layout, shape)
        if found is None:
            raise Stop("a reshape cuts through token rows")
        return found
    if target in (aten.permute.default,):
        out: list[Dim] = [()] * rank
        for i, d in enumerate(args[1]):  # type: ignore[arg-type]
            out[d % rank] = layout[i]
        return tuple(out)
    if target is aten.transpose.int:
        out = list(layout)
        a, b = args[1] % rank, args[2] % rank  # type: ignore[operator]
        out[a], out[b] = out[b], out[a]
        return tuple(out)
    if target is aten.t.default:
        return tuple(reversed(layout))
    if target is aten.unsqueeze.default:
        d = args[1] % (rank + 1)  # type: ignore[operator]
        return layout[:d] + layout[d + 1 :]
    if target in (aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default):
        dims = range(rank) if len(args) == 1 else _as_list(args[1])  # type: ignore[arg-type]
        gone = {d % rank for d in dims if shape[d] == 1}
        rest = iter(layout)
        return tuple(() if d in gone else next(rest) for d in range(rank))
    if target is aten.expand.default:
        offset = len(layout) - rank
        for i, dim in enumerate(layout):
            if tags(dim) and (i < offset or shape[i - offset] == 1) and _size(dim) != 1:
                raise Stop("token rows are broadcast here")
        return align(shape, layout)
    raise AssertionError(f"not a view: {node.target}")


def _size(dim: Dim) -> int:
    size = 1
    for factor in dim:
        size *= factor.size
    return size


def view(puller: RowPuller, node: Node, layout: Layout) -> Any:
    rows = puller.pull(node.args[0], view_back(node, layout))
    if node.target in RESHAPES:
        return puller.traced(node, lambda: rows.reshape(selected_shape(layout, puller.selection)))
    if node.target is aten.expand.default:
        return puller.traced(node, lambda: rows.expand(selected_shape(layout, puller.selection)))
    return puller.call(node, (rows, *node.args[1:]), dict(node.kwargs))


def on_free_dim(position: int, default: int, *, drops: bool = False, size: bool = False) -> Rule:
    """select, slice, chunk, split, unbind, index_select, flip ... along a dim without rows.

    drops: the dim is gone from the output (select, unbind); size: the output's dim is shorter.
    """

    def rule(puller: RowPuller, node: Node, layout: Layout) -> Any:
        x = node.args[0]
        shape = shape_of(x)
        given = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
        if not isinstance(given, int):
            raise Stop(f"{node.target} over several dims")
        dim = given % len(shape)
        out = list(layout)
        if drops:
            out.insert(dim, free(shape[dim]))
        if tags(out[dim]):
            raise Stop(f"{node.target} takes a part of the token rows")
        out[dim] = free(shape[dim])
        rows = puller.pull(x, tuple(out))
        rest = torch.fx.map_arg(node.args[1:], puller.full)
        return puller.call(node, (rows, *rest), dict(node.kwargs))

    return rule


def joined(*, stacked: bool) -> Rule:
    """cat and stack along a dim without rows."""

    def rule(puller: RowPuller, node: Node, layout: Layout) -> Any:
        given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        dim = given % len(layout)  # type: ignore[operator]
        require_free(layout, [dim], "cat along the tokens")
        parts = []
        for x in node.args[0]:  # type: ignore[union-attr]
            own = list(layout)
            if stacked:
                del own[dim]
            else:
                own[dim] = free(shape_of(x)[dim])
            parts.append(puller.operand(x, tuple(own), tuple(own)))
        parts = _broadcast(parts, dim) if not stacked else parts
        return puller.call(node, (parts, dim), {})

    return rule


def _broadcast(parts: list[Tensor], dim: int) -> list[Tensor]:
    """Cat needs equal sizes: a part without rows (a per-sample vector) is expanded to the others."""
    sizes = [list(p.shape) for p in parts]
    whole = [max((s[i] for s in sizes), key=lambda v: 0 if v == 1 else 1) for i in range(len(sizes[0]))]
    out = []
    for part, size in zip(parts, sizes, strict=True):
        want = [size[i] if i == dim else whole[i] for i in range(len(size))]
        out.append(part if want == size else part.expand(want))
    return out


def matmul(puller: RowPuller, node: Node, layout: Layout) -> Any:
    """matmul / bmm: rows in a batch dim or in the first operand's rows."""
    a, b = node.args[0], node.args[1]
    a_shape, b_shape = shape_of(a), shape_of(b)
    if min(len(a_shape), len(b_shape)) < 2:
        raise Stop("a matrix-vector product")
    require_free(layout, [-1], "a product over its last dim")
    a_own = (*align(a_shape[:-2], layout[:-2]), layout[-2], free(a_shape[-1]))
    b_own = (*align(b_shape[:-2], layout[:-2]), free(b_shape[-2]), layout[-1])
    return puller.call(
        node, (_whole(puller, a, a_own, layout), _whole(puller, b, b_own, layout)), dict(node.kwargs)
    )


def _whole(puller: RowPuller, node: Node, own: Layout, result: Layout) -> Any:
    """An operand of a product: all the rows' tags, none, or whole samples; never a lone token tag."""
    present = tags(own)
    if present == tags(result):
        return puller.pull(node, own)
    if not present or (present == {"b"} and puller.selection.per_sample):
        return puller.full(node)
    raise Stop("an operand of a product has only a part of the row factors")


def einsum(puller: RowPuller, node: Node, layout: Layout) -> Any:
    equation = str(node.args[0]).replace(" ", "")
    operands = list(node.args[1])  # type: ignore[arg-type]
    if "." in equation or "->" not in equation:
        raise Stop("einsum with an ellipsis or without an explicit output")
    left, out = equation.split("->")
    dims = dict(zip(out, layout, strict=True))
    values = []
    for letters, x in zip(left.split(","), operands, strict=True):
        own = tuple(dims.get(c, free(s)) for c, s in zip(letters, shape_of(x), strict=True))
        values.append(_whole(puller, x, own, layout))
    return puller.call(node, (node.args[0], values), dict(node.kwargs))


def attention(puller: RowPuller, node: Node, layout: Layout) -> Any:
    """Query rows are pushed; keys and values stay whole (or come from their row caches)."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if given.get("is_causal"):
        raise Stop("causal attention depends on the row's position among the queries")
    if given.get("dropout_p"):
        raise Stop("attention with dropout")
    if not puller.selection.per_sample and "b" in tags(layout):
        raise Stop("batched attention needs rows per sample")
    require_free(layout, [-1], "attention over its features")
    query, key, value = (given[k] for k in names[:3])
    rows = puller.pull(query, (*layout[:-1], free(shape_of(query)[-1])))
    mask = given.get("attn_mask")
    if isinstance(mask, Node):
        scores = (*layout[:-1], free(shape_of(key)[-2]))
        mask = puller.operand(mask, align(shape_of(mask), scores), scores)
    kwargs = {k: v for k, v in node.kwargs.items() if k not in names}
    return puller.call(node, (rows, puller.full(key), puller.full(value), mask), kwargs)


def item_of_tuple(puller: RowPuller, node: Node, layout: Layout) -> Any:
    """getitem of a multi-output op: the producer is pushed once, in the layout of this part."""
    producer, index = node.args
    parts = puller.pull(producer, layout)
    return parts[index]


RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
}
VIEWS = RESHAPES | {
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.expand.default,
}
# Composite ops without the pointwise tag that work element by element in inference.
POINTWISE = {
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.type_as.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.silu.default,
    aten.dropout.default,
    aten.square.default,
    aten.rsub.Scalar,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.masked_fill.Scalar,
}
RULES: dict[Any, Rule] = {
    **dict.fromkeys(VIEWS, view),
    aten.linear.default: linear,
    aten.addmm.default: addmm,
    aten.layer_norm.default: over_free_dims(_normalized_dims, keep=True),
    aten.rms_norm.default: over_free_dims(_normalized_dims, keep=True),
    aten.softmax.int: over_free_dims(_dim_arg(1), keep=True),
    aten._softmax.default: over_free_dims(_dim_arg(1), keep=True),
    aten.cumsum.default: over_free_dims(_dim_arg(1), keep=True),
    aten.sum.dim_IntList: over_free_dims(_dim_arg(1), keep=False),
    aten.mean.dim: over_free_dims(_dim_arg(1), keep=False),
    aten.amax.default: over_free_dims(_dim_arg(1), keep=False),
    aten.amin.default: over_free_dims(_dim_arg(1), keep=False),
    aten.var.correction: over_free_dims(_dim_arg(1), keep=False),
    aten.linalg_vector_norm.default: over_free_dims(_dim_arg(2), keep=False),
    aten.norm.ScalarOpt_dim: over_free_dims(_dim_arg(2), keep=False),
    aten.select.int: on_free_dim(1, 0, drops=True),
    aten.unbind.int: on_free_dim(1, 0, drops=True),
    aten.slice.Tensor: on_free_dim(1, 0),
    aten.chunk.default: on_free_dim(2, 0),
    aten.split.Tensor: on_free_dim(2, 0),
    aten.split_with_sizes.default: on_free_dim(2, 0),
    aten.split.sizes: on_free_dim(2, 0),
    aten.index_select.default: on_free_dim(1, 0),
    aten.narrow.default: on_free_dim(1, 0),
    aten.repeat_interleave.self_int: on_free_dim(2, 0),
    aten.flip.default: over_free_dims(_dim_arg(1), keep=True),
    aten.cat.default: joined(stacked=False),
    aten.stack.default: joined(stacked=True),
    aten.matmul.default: matmul,
    aten.bmm.default: matmul,
    aten.einsum.default: einsum,
    aten.scaled_dot_product_attention.default: attention,
}


def rule_for(target: Any) -> Rule | None:
    """The rule of an op; any op tagged pointwise has one; None: the push stops."""
    if target in RULES:
        return RULES[target]
    if getattr(target, "__name__", "") == "getitem":
        return item_of_tuple
    is_op = isinstance(target, torch._ops.OpOverload)
    if target in POINTWISE or (is_op and torch.Tag.pointwise in target.tags):
        return pointwise
    return None


__all__ = ["RULES", "VIEWS", "Factor", "Stop", "free_layout", "rule_for", "shape_of", "view_back"]
