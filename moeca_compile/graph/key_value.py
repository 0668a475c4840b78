"""Keys and values that can be cached by token row.

K [B, H, N, d], V the same          roots: their projections
K = cat([k image, k text])          root: the image part; the text part is computed in full
"""

from __future__ import annotations

import torch
from torch.fx import Node

from .dataflow import ancestors, descendants
from .dry_run import DryRun
from .layout import Dim, Layout, RowSpace, free, tags, window
from .region import RowRoot
from .row_rules import VIEWS, Stop, shape_of, view_back
from .streams import Above

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


def key_value_rows(
    core: Node, operands: tuple[Node, Node], query: DryRun, source: RowRoot, above: Above
) -> tuple[RowRoot, ...]:
    """Row roots of K and V; empty where their rows are not the query's tokens.

    source: what the queries are projected from. Keeping that would save no projection.
    """
    inputs = ancestors([source.node])
    roots: list[RowRoot] = []
    for operand in operands:
        row_dim = -1 if operand is operands[0] and core.target is not SDPA else -2
        root = _row_root(operand, row_dim, query.requested[core], above)
        if root is None or root.node in inputs or not _same_tokens(root, query, source, above):
            return ()
        if not _only_for(root.node, core):
            return ()
        if root not in roots:
            roots.append(root)
    return tuple(roots)


def _same_tokens(root: RowRoot, query: DryRun, source: RowRoot, above: Above) -> bool:
    """Whether these rows and the query's are made from rows of one value, near or far above."""
    if _meet(root, above.dry_pull(root), query):
        return True
    return _meet(root, above.far_pull(root), above.far_pull(source))


def _meet(root: RowRoot, dry: DryRun | None, query: DryRun | None) -> bool:
    if dry is None or query is None or root.node not in dry.pulled:
        return False
    return any(query.requested.get(n) == layout for n, layout in dry.requested.items())


def _only_for(node: Node, core: Node) -> bool:
    """Whether all that is made from the value goes into this core: others want it fresh."""
    return not any(n.op == "output" for n in descendants(node, stop={core}))


def _row_root(operand: Node, row_dim: int, requested: Layout, above: Above) -> RowRoot | None:
    """K or V as token rows, or the part of it that is, where more rows are joined to them."""
    shape, space = shape_of(operand), above.space
    if len(shape) != len(requested):
        return None
    dims = [
        d if tags(d) and shape[i] == _size(d) else free(shape[i])
        for i, d in enumerate(requested[:-2])
    ]
    for start in _starts(shape[row_dim], requested[-2], space):
        last = [free(shape[-2]), free(shape[-1])]
        last[row_dim] = window(shape[row_dim], start)
        layout = (*dims, *last)
        if tags(layout) != tags(requested):
            return None
        if shape[row_dim] == space.tokens:
            return RowRoot(*_above_views(operand, layout))
        part = above.part_of_cat(RowRoot(operand, layout))
        if part is not None:
            return RowRoot(*_above_views(part.node, part.layout))
    return None


def _starts(rows: int, query: Dim, space: RowSpace) -> list[int]:
    """Where the query's tokens may begin among `rows` keys: as in the queries, first, last."""
    begins = [f.start for f in query if f.tag == "n"] + [0, rows - space.tokens]
    return list(dict.fromkeys(s for s in begins if 0 <= s <= rows - space.tokens))


def _above_views(node: Node, layout: Layout) -> tuple[Node, Layout]:
    """Cache above changes of shape and repeated heads: rows are then contiguous and stored once."""
    while True:
        try:
            if node.target in VIEWS:
                above = view_back(node, layout)
            elif node.target is aten.repeat_interleave.self_int:
                shape = shape_of(node.args[0])
                above = tuple(
                    d if _size(d) == s else free(s) for d, s in zip(layout, shape, strict=True)
                )
            elif node.target in (aten.clone.default, aten.contiguous.default):
                above = layout
            else:
                return node, layout
        except Stop:
            return node, layout
        if tags(above) != tags(layout):
            return node, layout
        node, layout = node.args[0], above  # type: ignore[assignment]


def _size(dim: tuple) -> int:
    size = 1
    for factor in dim:
        size *= factor.size
    return size
