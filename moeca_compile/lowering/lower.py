"""Variants traced and lowered: `moeca::` cache and guard nodes become ops that Inductor fuses.

moeca.cache_read(c, T)          ->  c[:T]                      a view
moeca.cache_write(c, idx, rows) ->  c.index_copy_(0, idx, rows)   O(len(idx)), in place
moeca.cache_fill(c, rows)       ->  c.copy_(rows)
moeca.guard_branches(...)       ->  lowering.guards.guard_branches inlined, its results stored
moeca.grouped_linear(...)       ->  a grouped product on CUDA (lowering/grouped.py), else itself
aten.linear(few rows, w, b)     ->  moeca.few_rows_linear on a CPU (lowering/few_rows.py)
aten.scaled_dot_product_attention(few queries, k, v) -> moeca.few_queries_attention, likewise
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, map_arg
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from ..graph.counterparts import looks
from ..graph.functional import mutates
from ..graph.region import ORIGIN
from ..torch_compat import graph_module, without_code
from . import few_queries, few_rows, grouped, guards

aten = torch.ops.aten
moeca = torch.ops.moeca


def _read(cache: Tensor, rows: int) -> Tensor:
    return cache if cache.shape[0] == rows else cache.narrow(0, 0, rows)


def _write(cache: Tensor, index: Tensor, rows: Tensor) -> None:
    cache.index_copy_(0, index, rows.to(cache.dtype))


def _fill(cache: Tensor, rows: Tensor) -> None:
    cache.copy_(rows)


def _guard(*args: Any) -> tuple[Tensor, ...]:
    """Values per slot that every kernel behind reads: stored once, as `as_strided` makes Inductor
    do. Otherwise each works them out again from the router's output, for every element of a row.
    """
    return tuple(v.as_strided(v.shape, v.stride()) for v in guards.guard_branches(*args))


LOWERINGS: dict[Any, Callable[..., Any]] = {
    moeca.cache_read.default: _read,
    moeca.cache_write.default: _write,
    moeca.cache_fill.default: _fill,
    moeca.expert_thresholds.default: guards.expert_thresholds,
    moeca.guard_branches.default: _guard,
    moeca.grouped_linear.default: grouped.grouped_linear,
}

# Where the value looks as the operand does, dtype and strides included, it is the operand.
HANDING_ON = {
    aten.to.dtype,
    aten.permute.default,
    aten.reshape.default,
    aten.view.default,
    aten.narrow.default,
    aten.slice.Tensor,
}
READING = {aten.select.int, aten.unbind.int, getitem, aten.item.default}


@without_code()
def trace(function: Callable[..., Any], inputs: Sequence[Tensor], fake_mode: Any) -> GraphModule:
    """`function` on fake inputs as an ATen graph, dead code removed."""
    with torch.no_grad(), fake_mode, preserve_node_meta():
        traced = make_fx(function, pre_dispatch=True)(*inputs)
    return _finished(traced)


def _finished(gm: GraphModule) -> GraphModule:
    gm.graph.eliminate_dead_code(_is_impure)
    gm.graph.lint()
    gm.recompile()
    return gm


@without_code()
def lower(gm: GraphModule, fake_mode: Any) -> GraphModule:
    """The same graph with LOWERINGS applied; only what takes the place of a node is traced, once
    for all nodes that do the same to values of the same sizes."""
    graph, made, traced = Graph(), dict[Node, Any](), dict[Any, Graph]()
    for node in gm.graph.nodes:
        whole = made.get(node.args[0]) if node.target is getitem else None
        if isinstance(whole, tuple):
            made[node] = whole[node.args[1]]
        elif node.target in LOWERINGS or _has_few_rows(node):
            made[node] = _inline(graph, node, made, fake_mode, traced)
        elif _changes_nothing(node):
            made[node] = made[node.args[0]]
        else:
            made[node] = graph.node_copy(node, made.__getitem__)
    lowered = graph_module(gm, graph)
    lowered.meta.update(gm.meta)
    return _finished(lowered)


def share_counts(gm: GraphModule, counts: Node, rows: Sequence[int]) -> None:
    """Read row `rows[i]` of the counts where row `i` was read, and every number once.

    Layers of equal sizes have equal counts. Where they are compiled together, one name for both
    spares sympy half of the indices. Not before a graph is cut: pieces hand on no sizes.
    """
    read: dict[tuple[Any, ...], Node] = {}
    for node in list(gm.graph.nodes):
        source, *which = node.args if node.target in READING else (None,)
        if source is counts and node.target is aten.select.int:
            which[1] = rows[which[1]]
            node.args = (counts, *which)
        elif source not in read.values():
            continue
        first = read.setdefault((node.target, source, *which), node)
        if first is not node:
            node.replace_all_uses_with(first)
            gm.graph.erase_node(node)


def _has_few_rows(node: Node) -> bool:
    """Whether the node computes few rows, or selected ones: how many is known later."""
    if node.target not in OF_FEW_ROWS:
        return False
    pays, _ = OF_FEW_ROWS[node.target]
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])  # type: ignore[misc]
    return pays(*args, **kwargs)


def _few_rows_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return moeca.few_rows_linear(rows, weight, bias)


def _few_queries_attention(
    q: Tensor, k: Tensor, v: Tensor, *_: Any, scale: float | None = None, **__: Any
) -> Tensor:
    return moeca.few_queries_attention(q, k, v, scale)


OF_FEW_ROWS: dict[Any, tuple[Callable[..., bool], Callable[..., Tensor]]] = {
    aten.linear.default: (few_rows.pays, _few_rows_linear),
    aten.scaled_dot_product_attention.default: (few_queries.pays, _few_queries_attention),
}


def _changes_nothing(node: Node) -> bool:
    """Whether the node hands its operand on: what row subsetting writes for any layout and dtype is
    mostly of that kind, and every node costs Inductor milliseconds."""
    if node.target not in HANDING_ON or node.kwargs:
        return False
    operand, *settings = node.args
    if node.target is aten.to.dtype and len(settings) > 1:  # asked for a copy, maybe
        return False
    before = operand.meta.get("val") if isinstance(operand, Node) else None  # None: a constant
    now = node.meta["val"]
    if not isinstance(before, Tensor) or (before.dtype, before.dim()) != (now.dtype, now.dim()):
        return False
    return looks(before) == looks(now)


def _inline(
    graph: Graph, node: Node, made: dict[Node, Any], fake_mode: Any, traced: dict[Any, Graph]
) -> Any:
    """Append what `node` is lowered to; its result as nodes of `graph`."""
    key = _kind(node)
    inner = traced.get(key)
    if inner is None:
        inner = traced[key] = _trace_node(node, fake_mode)
    holes = inner.find_nodes(op="placeholder")
    names = dict(zip(holes, (made[a] for a in node.all_input_nodes), strict=True))
    for each in inner.nodes:
        if each.op == "output":
            return map_arg(each.args[0], names.__getitem__)
        if each.op != "placeholder":
            names[each] = graph.node_copy(each, names.__getitem__)
            names[each].meta.update({k: node.meta[k] for k in ORIGIN if k in node.meta})
    return None


def _trace_node(node: Node, fake_mode: Any) -> Graph:
    inputs = node.all_input_nodes

    def run(*given: Any) -> Any:
        values = dict(zip(inputs, given, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        lowering = LOWERINGS.get(node.target) or OF_FEW_ROWS[node.target][1]
        return lowering(*args, **kwargs)

    with torch.no_grad(), fake_mode:
        return make_fx(run, pre_dispatch=True)(*(a.meta["val"] for a in inputs)).graph


def _kind(node: Node) -> tuple[Any, ...]:
    """What its lowering depends on: the op, its constants, and what its inputs look like. Sizes
    that are known at run time only count as equal where they are one symbol."""
    inputs = node.all_input_nodes
    place = {each: f"%{i}" for i, each in enumerate(inputs)}
    return (
        node.target,
        repr(map_arg((node.args, node.kwargs), place.__getitem__)),  # type: ignore[arg-type]
        *(looks(each.meta["val"]) for each in inputs),
    )


def _is_impure(node: Node) -> bool:
    """Cache writes have no users and must stay; size checks guard what Inductor may assume."""
    return node.is_impure() or mutates(node)
