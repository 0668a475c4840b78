"""Variants traced and lowered: `moeca::` cache and guard nodes become ops that Inductor fuses.

moeca.cache_read(c, T)          ->  c[:T]                      a view
moeca.cache_write(c, idx, rows) ->  c.index_copy_(0, idx, rows)   O(len(idx)), in place
moeca.cache_fill(c, rows)       ->  c.copy_(rows)
moeca.guard_branches(...)       ->  lowering.guards.guard_branches inlined, its results stored
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from . import guards

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
}


class _Lower(Interpreter):
    """Row counts read from a tensor get the bounds again that they had in the dialect graph."""

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.target is torch.ops.aten.item.default and isinstance(result, torch.SymInt):
            known = n.meta["val"].node
            bounds = known.shape_env.bound_sympy(known.expr)
            torch._check(result >= int(bounds.lower))
            torch._check(result <= int(bounds.upper))
        return result

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        op = cast(Callable[..., Any], LOWERINGS.get(target, target))
        return op(*args, **kwargs)


def trace(function: Callable[..., Any], inputs: Sequence[Tensor], fake_mode: Any) -> GraphModule:
    """`function` on fake inputs as an ATen graph, dead code removed."""
    with torch.no_grad(), fake_mode, preserve_node_meta():
        traced = make_fx(function, pre_dispatch=True)(*inputs)
    traced.graph.eliminate_dead_code(_is_impure)
    traced.graph.lint()
    traced.recompile()
    return traced


def lower(gm: GraphModule, inputs: Sequence[Tensor], fake_mode: Any) -> GraphModule:
    """The same graph with LOWERINGS applied."""
    return trace(lambda *args: _Lower(gm).run(*args), inputs, fake_mode)


def _is_impure(node: Node) -> bool:
    """Cache writes have no users and must stay; size checks guard what Inductor may assume."""
    if node.is_impure():
        return True
    schema = getattr(node.target, "_schema", None)
    return bool(schema and schema.is_mutable)
