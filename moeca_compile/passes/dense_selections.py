"""Rows picked by a mask, computed and put back -> the same on all rows, then a choice by the mask.

How many rows a mask picks is known at run time only; such sizes stop every pass behind this one.

    before:  at = where(mask [T])[0];  y = out.index_put([at], f(x[at] [u, D]))
    after:   y = where(mask[:, None], f(x [T, D]), out)

Right where f works row by row, which is checked by the row rules; else nothing is changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..graph.dataflow import ancestors, descendants
from ..graph.dry_run import dry_pull
from ..graph.layout import Factor, RowSpace, free_layout
from ..graph.region import NoMatch, RowRoot, module_path
from ..graph.routing_ids import row_index
from ..graph.row_rules import VIEWS, shape_of
from ..torch_compat import leaves
from .base import PassReport

aten = torch.ops.aten
SIZES = {aten.sym_size.int}
FILLS = {aten.index_fill.int_Scalar, aten.index_fill.int_Tensor}  # what out[at] = 1.0 may come as
FLATTENED = {aten.select.int, aten.squeeze.dim, aten.squeeze.default, aten.flatten.using_ints}


class NotDense(Exception):
    """A selection that cannot be computed on all rows; `node` is in the way."""

    def __init__(self, reason: str, node: Node):
        super().__init__(reason)
        self.node = node


@dataclass(frozen=True)
class Picked:
    """The rows that `mask [T]` picks: `positions` [u]."""

    mask: Node
    positions: Node


@dataclass(frozen=True)
class DenseSelections:
    """Compute rows picked by a mask on all rows, or say why not."""

    name: str = "dense_selections"

    def run(self, gm: GraphModule) -> PassReport:
        missed, changed = [], 0
        for picked in find_picked(gm):
            try:
                make_dense(gm, picked)
                changed += 1
            except NotDense as error:
                reason = f"rows picked by a mask: {error}"
                missed.append(NoMatch("moe", module_path(picked.mask), reason, error.node))
        if changed:
            gm.graph.lint()
            gm.recompile()
        return PassReport(self.name, changed, tuple(missed))


def find_picked(gm: GraphModule) -> list[Picked]:
    """All `where(mask)[0]`, `nonzero(mask)[:, 0]` and the like over masks of one dim."""
    found = []
    for node in gm.graph.nodes:
        mask = _mask_of(node)
        if mask is not None and len(shape_of(mask)) == 1:
            found.append(Picked(mask, node))
    return found


def _mask_of(node: Node) -> Node | None:
    source: Any = node.args[0] if node.args else None
    if getattr(node.target, "__name__", "") == "getitem" and node.args[1] == 0:
        lists = (aten.where.default, aten.nonzero_numpy.default)
        return source.args[0] if source.target in lists else None
    if node.target in FLATTENED and source.target is aten.nonzero.default:
        return source.args[0] if node.meta["val"].dim() == 1 else None
    return None


def make_dense(gm: GraphModule, picked: Picked) -> None:
    """Rewrite one selection. Raises NotDense, the graph then unchanged."""
    below = descendants(picked.positions)
    puts = [n for n in gm.graph.nodes if n in below and _puts_back(n, picked.positions)]
    if not puts:
        raise NotDense("they are not put back in their places", picked.positions)
    below = descendants(picked.positions, stop=set(puts)) - set(puts) - {picked.positions}
    rows = [n for n in gm.graph.nodes if n in below]
    out = gm.graph.output_node()
    if out in below:
        raise NotDense("their number, or a value of only them, is used elsewhere", out)
    dense = _Dense(gm, picked, below)
    try:
        for node in rows:
            dense.add(node)
        results = [dense.put(node) for node in puts]
    except NotDense:
        dense.undo()
        raise
    for node, result in zip(puts, results, strict=True):
        node.replace_all_uses_with(result)
    producer: Any = picked.positions.args[0]
    for node in [*reversed(puts), *reversed(rows), picked.positions]:
        gm.graph.erase_node(node)
    sizes = descendants(producer) - {producer}
    if all(_is_size_arithmetic(n) for n in sizes):
        for node in [n for n in reversed(gm.graph.nodes) if n in sizes or n is producer]:
            gm.graph.erase_node(node)


class _Dense:
    """The nodes of a selection, built once more on all rows.

    values: node of the selection -> node or number that stands for it.
    """

    def __init__(self, gm: GraphModule, picked: Picked, below: set[Node]):
        self.gm, self.picked, self.below = gm, picked, below
        self.tokens = shape_of(picked.mask)[0]
        self.values: dict[Node, Any] = {}
        self.new: list[Node] = []
        self._old = set(gm.graph.nodes)

    def add(self, node: Node) -> None:
        found = row_index(node)
        if found is not None and found[1] is self.picked.positions:
            source = found[0]
            if source in self.below or shape_of(source)[0] != self.tokens:
                raise NotDense("rows of another tensor than the mask's", node)
            self.values[node] = source
        elif self.picked.positions not in node.all_input_nodes:
            self.values[node] = self._again(node)
        elif node.target in SIZES:
            self.values[node] = self.tokens
        else:
            raise NotDense(f"{node.target} of their positions", node)

    def put(self, node: Node) -> Node:
        """`where(mask, rows, base)` in place of the rows put back."""
        fills = node.target in FILLS
        base, rows = node.args[0], node.args[3 if fills else 2]
        value = self.values.get(rows, rows)  # type: ignore[arg-type]
        shape = [] if fills else shape_of(value)  # a fill puts one number
        if rows in self.below:
            self._check_by_row(value, node)
        elif shape[:1] not in ([], [1]) and len(shape) >= len(shape_of(base)):
            raise NotDense("rows from elsewhere are put in their places", node)
        wide = [self.tokens] + [1] * (len(shape_of(base)) - 1)
        with self.gm.graph.inserting_before(node):
            mask = self._emit(node, aten.reshape.default, self.picked.mask, wide)
            if not isinstance(value, Node):
                return self._emit(node, aten.masked_fill.Scalar, base, mask, value)
            cast = self._emit(node, aten.to.dtype, value, node.meta["val"].dtype)
            return self._emit(node, aten.where.self, mask, cast, base)

    def undo(self) -> None:
        for node in reversed(self.new):
            self.gm.graph.erase_node(node)

    def _again(self, node: Node) -> Any:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: self.values.get(n, n))
        counted = any(isinstance(self.values.get(n), (int, bool)) for n in node.all_input_nodes)
        if counted and node.target not in VIEWS and not _is_size_arithmetic(node):
            raise NotDense(f"their number is used in {node.target}", node)
        if not any(isinstance(leaf, Node) for leaf in leaves((args, kwargs))[0]):
            return node.target(*args, **kwargs)  # type: ignore[operator]  # sizes, now numbers
        with self.gm.graph.inserting_before(node):
            return self._emit(node, node.target, *args, **kwargs)

    def _emit(self, origin: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.gm.graph.call_function(target, args, kwargs)
        self.new.append(node)
        known_args, known_kwargs = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.picked.mask.meta["val"].fake_mode, torch.no_grad():
            try:
                value = target(*known_args, **known_kwargs)
            except (RuntimeError, TypeError, ValueError) as error:
                raise NotDense(f"{target} does not fit all rows: {error}", origin) from None
        node.meta = {**origin.meta, "val": value}
        return node

    def _check_by_row(self, value: Node, put: Node) -> None:
        """Row t of `value` must depend on row t of what was picked from, and on nothing else."""
        shape = shape_of(value)
        if shape[:1] != [self.tokens]:
            raise NotDense("what is put back has other rows", put)
        layout = ((Factor(self.tokens, "n"),), *free_layout(shape[1:]))
        dry = dry_pull([RowRoot(value, layout)], self._old, RowSpace(1, self.tokens))
        if dry is None:
            raise NotDense("what is put back is no function of single rows", put)
        if dry.stops:
            raise NotDense(f"no function of single rows: {next(iter(dry.stops.values()))}", put)
        above = ancestors([value])
        mixed = [n for n in self.new if n in above and n not in dry.pulled]
        if mixed:
            raise NotDense(f"no function of single rows: {mixed[0].target} is taken over all", put)


def _is_size_arithmetic(node: Node) -> bool:
    """A number made of numbers, or an assertion about one."""
    value = node.meta.get("val")
    return not isinstance(value, (torch.Tensor, tuple, list))


def _puts_back(node: Node, positions: Node) -> bool:
    args: Any = node.args
    if node.target in FILLS:
        return args[1] == 0 and args[2] is positions
    if node.target is not aten.index_put.default or list(args[1]) != [positions]:
        return False
    return not (args[3] if len(args) > 3 else node.kwargs.get("accumulate", False))
