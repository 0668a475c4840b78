"""Push-down through ops that pick, join or lengthen along a dim: legal where no rows live.

request  qkv.chunk(3, -1)[1] rows idx   ->  (qkv rows idx).chunk(3, -1)[1]      [B, n, D]
request  table[ids [B, N]] rows idx     ->  table[ids rows idx]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from .layout import Layout, free, tags
from .rule_base import Rule, Stop, argument, require_free, rest_in_full, shape_of

if TYPE_CHECKING:
    from .pull import RowPuller

aten = torch.ops.aten


def on_free_dim(position: int, default: int, *, drops: bool = False) -> Rule:
    """select, slice, chunk, split, unbind, index_select, topk ... along a dim without rows.

    drops: the dim is gone from the output (select, unbind).
    """

    def rule(puller: RowPuller, node: Node, layout: Layout) -> Any:
        shape = shape_of(node.args[0])
        given = argument(node, position, "dim", default)
        if not isinstance(given, int):
            raise Stop(f"{node.target} over several dims")
        dim = given % len(shape)
        out = list(layout)
        if drops:
            out.insert(dim, free(shape[dim]))
        if tags(out[dim]):
            raise Stop(f"{node.target} takes a part of the token rows")
        out[dim] = free(shape[dim])
        return rest_in_full(puller, node, tuple(out))

    return rule


def repeat(puller: RowPuller, node: Node, layout: Layout) -> Any:
    """repeat and tile of dims without rows."""
    shape = shape_of(node.args[0])
    times: Any = argument(node, 1, "repeats")
    times = [1] * (len(layout) - len(times)) + list(times)
    require_free(layout, [i for i, t in enumerate(times) if t != 1], "a repeat")
    offset = len(layout) - len(shape)
    own = tuple(
        free(size) if times[offset + i] != 1 else layout[offset + i] for i, size in enumerate(shape)
    )
    return puller.call(node, (puller.pull(node.args[0], own), times), {})


def padded(puller: RowPuller, node: Node, layout: Layout) -> Any:
    """pad and constant_pad_nd of dims without rows."""
    shape = shape_of(node.args[0])
    dims = _padded_dims(node)
    require_free(layout, dims, "padding")
    own = tuple(free(shape[i]) if i in dims else dim for i, dim in enumerate(layout))
    return rest_in_full(puller, node, own)


def gather(puller: RowPuller, node: Node, layout: Layout) -> Any:
    """x.gather(dim, index): both have rows; `dim` has none."""
    args: Any = node.args
    x, dim, index = args[:3]
    shape, picked = shape_of(x), shape_of(index)
    dim %= len(shape)
    require_free(layout, [dim], "gather")
    own = [d if shape[i] == picked[i] else free(shape[i]) for i, d in enumerate(layout)]
    own[dim] = free(shape[dim])
    if tags(tuple(own)) != tags(layout):
        raise Stop("gather from more rows than it returns")
    rows = puller.pull(x, tuple(own))
    return puller.call(node, (rows, dim, puller.pull(index, layout)), {})


def lookup(puller: RowPuller, node: Node, layout: Layout) -> Any:
    """x[..., index, ...] with one index tensor: rows in the index (a table) or in x."""
    x: Any = node.args[0]
    entries: Any = node.args[1]
    at = [i for i, e in enumerate(entries) if e is not None]
    if len(at) != 1 or entries[at[0]].meta["val"].dtype == torch.bool:
        raise Stop("indexing with several tensors or with a mask")
    first, index = at[0], entries[at[0]]
    width = len(shape_of(index))
    own = (*layout[:first], free(shape_of(x)[first]), *layout[first + width :])
    part = layout[first : first + width]
    if tags(part) and tags(own):
        raise Stop("indexing that has rows both in the index and in the values")
    values = puller.pull(x, own)
    places = puller.pull(index, part)
    return puller.call(node, (values, [*([None] * first), places]), {})


def embedding(puller: RowPuller, node: Node, layout: Layout) -> Any:
    require_free(layout, [-1], "an embedding's features")
    places = puller.pull(node.args[1], layout[:-1])
    return puller.call(node, (puller.full(node.args[0]), places), {})


def one_hot(puller: RowPuller, node: Node, layout: Layout) -> Any:
    require_free(layout, [-1], "one_hot")
    classes = int(shape_of(node)[-1])  # -1, "as many as there are", would depend on the rows
    return puller.call(node, (puller.pull(node.args[0], layout[:-1]), classes), {})


def joined(*, stacked: bool) -> Rule:
    """cat and stack along a dim without rows."""

    def rule(puller: RowPuller, node: Node, layout: Layout) -> Any:
        dim = argument(node, 1, "dim", 0) % len(layout)
        require_free(layout, [dim], "cat along the tokens")
        sources: Any = node.args[0]
        parts = []
        for x in sources:
            middle = () if stacked else (free(shape_of(x)[dim]),)
            parts.append(puller.pull(x, (*layout[:dim], *middle, *layout[dim + 1 :])))
        return puller.call(node, (parts, dim), {})

    return rule


def _padded_dims(node: Node) -> list[int]:
    """Dims that get longer; `pad` lists (before, after) from the last dim on."""
    pad: Any = node.args[1]
    rank = len(shape_of(node))
    return [rank - 1 - i // 2 for i in range(0, len(pad), 2) if pad[i] or pad[i + 1]]


INDEX_RULES: dict[Any, Rule] = {
    aten.select.int: on_free_dim(1, 0, drops=True),
    aten.unbind.int: on_free_dim(1, 0, drops=True),
    aten.slice.Tensor: on_free_dim(1, 0),
    aten.narrow.default: on_free_dim(1, 0),
    aten.index_select.default: on_free_dim(1, 0),
    aten.glu.default: on_free_dim(1, -1),
    aten.sort.default: on_free_dim(1, -1),
    aten.argsort.default: on_free_dim(1, -1),
    aten.chunk.default: on_free_dim(2, 0),
    aten.split.Tensor: on_free_dim(2, 0),
    aten.split.sizes: on_free_dim(2, 0),
    aten.split_with_sizes.default: on_free_dim(2, 0),
    aten.tensor_split.sections: on_free_dim(2, 0),
    aten.tensor_split.indices: on_free_dim(2, 0),
    aten.repeat_interleave.self_int: on_free_dim(2, 0),
    aten.topk.default: on_free_dim(2, -1),
    aten.gather.default: gather,
    aten.index.Tensor: lookup,
    aten.embedding.default: embedding,
    aten.one_hot.default: one_hot,
    aten.repeat.default: repeat,
    aten.tile.default: repeat,
    aten.pad.default: padded,
    aten.constant_pad_nd.default: padded,
    aten.cat.default: joined(stacked=False),
    aten.concat.default: joined(stacked=False),
    aten.concatenate.default: joined(stacked=False),
    aten.stack.default: joined(stacked=True),
}
