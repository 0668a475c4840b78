"""Push-down through ops that pick, join or lengthen along a dim: legal where no rows live.

request  qkv.chunk(3, -1)[1] rows idx   ->  (qkv rows idx).chunk(3, -1)[1]      [B, n, D]
request  table[ids [B, N]] rows idx     ->  table[ids rows idx]

Along the token dim itself only what keeps the tokens together: a part of more rows, and joining
the tokens with other rows. There a request moves on, and nothing is computed.

request  joint[:, s:s + N] rows idx     ->  joint rows s + idx
request  cat([text, x], 1) rows M + idx ->  x rows idx
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from .layout import Layout, free, tags, window
from .rule_base import Rule, Stop, argument, require_free, rest_in_full, shape_of

if TYPE_CHECKING:
    from .pull import RowPuller

aten = torch.ops.aten
JOINS = {aten.cat.default, aten.concat.default, aten.concatenate.default}
PARTS = {aten.slice.Tensor, aten.narrow.default}
SPLITS = {
    aten.chunk.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
}


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
            begins = part_start(node) if node.target in PARTS else None
            if begins is None:
                raise Stop(f"{node.target} takes a part of the token rows")
            return puller.pull(node.args[0], moved(layout, dim, shape[dim], begins))
        out[dim] = free(shape[dim])
        return rest_in_full(puller, node, tuple(out))

    return rule


def part_start(node: Node, part: int = 0) -> int | None:
    """Where a part of consecutive rows begins: of slice, narrow, and the parts of split and chunk.

    None for ops that take something else.
    """
    if node.target is aten.slice.Tensor:
        if argument(node, 4, "step", 1) != 1:
            return None
        size = shape_of(node.args[0])[argument(node, 1, "dim", 0)]
        start = argument(node, 2, "start") or 0
        return min(max(start + size if start < 0 else start, 0), size)
    if node.target is aten.narrow.default:
        start: Any = argument(node, 2, "start")
        return start if isinstance(start, int) and start >= 0 else None
    if node.target in SPLITS:
        sizes = [int(v.shape[argument(node, 2, "dim", 0)]) for v in node.meta["val"]]
        return sum(sizes[:part])
    return None


def moved(layout: Layout, dim: int, size: int, by: int) -> Layout:
    """The layout in a value whose dim `dim` has `size` rows, `by` of them before this one's.

    Raises Stop where the token rows share the dim with others.
    """
    factors = layout[dim]
    if len(factors) != 1 or factors[0].tag != "n":
        raise Stop("a part of rows merged with samples or heads")
    return (*layout[:dim], window(size, factors[0].start + by), *layout[dim + 1 :])


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
        sources: Any = node.args[0]
        if tags(layout[dim]) and not stacked:
            return _from_part(puller, sources, layout, dim)
        require_free(layout, [dim], "cat along the tokens")
        parts = []
        for x in sources:
            middle = () if stacked else (free(shape_of(x)[dim]),)
            parts.append(puller.pull(x, (*layout[:dim], *middle, *layout[dim + 1 :])))
        return puller.call(node, (parts, dim), {})

    return rule


def _from_part(puller: RowPuller, sources: list[Node], layout: Layout, dim: int) -> Any:
    """Token rows that all come from one of the joined values."""
    tokens, begins = puller.selection.space.tokens, 0
    for x in sources:
        size = shape_of(x)[dim]
        start = layout[dim][0].start - begins
        if start >= 0 and start + tokens <= size:
            return puller.pull(x, moved(layout, dim, size, -begins))
        begins += size
    raise Stop("cat along the tokens, which come from several parts")


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
