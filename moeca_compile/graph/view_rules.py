"""Push-down through ops that only rename dims: reshapes, permutations, expand, complex views.

request  x.view(B, N, H, d).transpose(1, 2) rows (b,)(H,)(n,)(d,)
     ->  x rows (b,)(n,)(H * d,), then the same view and transpose on [B, n, H * d]
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from .layout import Dim, Layout, align, free, recut, selected_shape, tags
from .rule_base import Rule, Stop, argument, require_free, shape_of

if TYPE_CHECKING:
    from .pull import RowPuller

aten = torch.ops.aten

RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.view_as.default,
    aten.reshape_as.default,
}
SQUEEZES = {aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default}
EXPANDS = {aten.expand.default, aten.expand_as.default, aten.broadcast_to.default}
SWAPS = {aten.transpose.int, aten.swapaxes.default, aten.swapdims.default}
LAST_SWAPS = {aten.t.default, aten.mT.default}
MOVES = {aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist}
PERMUTES = SWAPS | LAST_SWAPS | MOVES | {aten.permute.default, aten.numpy_T.default}
VIEWS = RESHAPES | SQUEEZES | EXPANDS | PERMUTES | {aten.unsqueeze.default}


def view_back(node: Node, layout: Layout) -> Layout:
    """The layout of a view-like node's input. Raises Stop where rows would be cut."""
    shape = shape_of(node.args[0])
    rank = len(shape)
    target = node.target
    if target in RESHAPES:
        found = recut(layout, shape)
        if found is None:
            raise Stop("a reshape cuts through token rows")
        return found
    if target in PERMUTES:
        out: list[Dim] = [()] * rank
        for i, d in enumerate(_permutation(node, rank)):
            out[d] = layout[i]
        return tuple(out)
    if target is aten.unsqueeze.default:
        d = argument(node, 1, "dim") % (rank + 1)
        return layout[:d] + layout[d + 1 :]
    if target in SQUEEZES:
        dims = argument(node, 1, "dim", tuple(range(rank)))
        gone = {d % rank for d in ([dims] if isinstance(dims, int) else dims)}
        gone = {d for d in gone if shape[d] == 1}
        rest = iter(layout)
        return tuple(() if d in gone else next(rest) for d in range(rank))
    if target in EXPANDS:
        offset = len(layout) - rank
        for i, dim in enumerate(layout):
            if tags(dim) and (i < offset or shape[i - offset] == 1) and _size(dim) != 1:
                raise Stop("token rows are broadcast here")
        return align(shape, layout)
    raise AssertionError(f"not a view: {node.target}")


def _permutation(node: Node, rank: int) -> list[int]:
    """out dim i is in dim result[i]."""
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [d % rank for d in argument(node, 1, "dims")]
    if node.target is aten.numpy_T.default:
        return order[::-1]
    if node.target in LAST_SWAPS:
        return [*order[:-2], *order[-2:][::-1]]
    args: Any = node.args
    first, second = args[1:3]  # SWAPS: two dims; MOVES: source and destination
    if node.target in SWAPS:
        a, b = first % rank, second % rank
        order[a], order[b] = order[b], order[a]
        return order
    sources = [d % rank for d in ([first] if isinstance(first, int) else first)]
    targets = [d % rank for d in ([second] if isinstance(second, int) else second)]
    moved = dict(zip(targets, sources, strict=True))
    rest = iter(d for d in order if d not in sources)
    return [moved[i] if i in moved else next(rest) for i in range(rank)]


def _size(dim: Dim) -> int:
    return math.prod(f.size for f in dim)


def view(puller: RowPuller, node: Node, layout: Layout) -> Any:
    """Sizes come from the layout, never from the arguments: those name all rows, or -1."""
    rows = puller.pull(node.args[0], view_back(node, layout))
    if node.target in PERMUTES:
        return puller.call(node, (rows, *node.args[1:]), dict(node.kwargs))
    shape = selected_shape(layout, puller.selection)
    if node.target in EXPANDS:
        return puller.traced(node, lambda: rows.expand(shape))
    # A squeeze would also drop a row dim of which only one row is left, a reshape does not.
    return puller.traced(node, lambda: rows.reshape(shape))


def to_complex(puller: RowPuller, node: Node, layout: Layout) -> Any:
    """view_as_complex: [..., 2] -> complex [...]."""
    return puller.call(node, (puller.pull(node.args[0], (*layout, free(2))),), {})


def to_real(puller: RowPuller, node: Node, layout: Layout) -> Any:
    """view_as_real: complex [...] -> [..., 2]."""
    require_free(layout, [-1], "the real view of complex numbers")
    return puller.call(node, (puller.pull(node.args[0], layout[:-1]),), {})


def transposed_of(node: Node) -> Node | None:
    """The value [E, O, I] that [E, I, O] is a transpose of; None for anything else."""
    args: Any = node.args
    if node.target is aten.mT.default:
        return args[0]
    if node.target in SWAPS:
        return args[0] if {d % 3 for d in args[1:]} == {1, 2} else None
    if node.target is aten.permute.default:
        return args[0] if [d % 3 for d in args[1]] == [0, 2, 1] else None
    return None


VIEW_RULES: dict[Any, Rule] = {
    **dict.fromkeys(VIEWS, view),
    aten.view_as_complex.default: to_complex,
    aten.view_as_real.default: to_real,
}
