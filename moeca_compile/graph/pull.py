"""The row push-down engine: compute only the selected rows of a value.

A request (node, layout) climbs the graph through `row_rules` until it meets values that are there
in full anyway; those are gathered. It is an interpreter: run under tracing it emits the smaller
graph, run on fake tensors it is a dry run that says how far a request gets.

    pull(proj(sdpa(q(x), k, v)) rows idx)  ->  proj(sdpa(q(x[idx]), K cache, V cache))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.traceback import set_current_meta

from .layout import Layout, Selection, gather_operand, gather_rows, selected_shape, tags
from .row_rules import Stop, rule_for


class RowPuller:
    """Evaluates nodes on the rows of `selection`.

    full: value of a node with all its rows. available: nodes whose full value is needed anyway, so
    the push ends there. Records `pulled` (nodes evaluated on rows), `stops` (node -> reason) and
    `met` (the layout each node was asked for).
    """

    def __init__(
        self,
        selection: Selection,
        full: Callable[[Node], Any],
        available: Callable[[Node], bool],
    ):
        self.selection = selection
        self.pulled: set[Node] = set()
        self.stops: dict[Node, str] = {}
        self.met: dict[Node, Layout] = {}
        self._full = full
        self._available = available
        self._memo: dict[tuple[Node, Layout], Any] = {}

    def full(self, value: Any) -> Any:
        """The whole value of a node (constants pass through)."""
        return self._full(value) if isinstance(value, Node) else value

    def pull(self, node: Any, layout: Layout) -> Any:
        """Rows of `node`. The layout must hold all row tags of the request."""
        if not tags(layout):
            return self.full(node)
        key = (node, layout)
        if key not in self._memo:
            self._memo[key] = self._compute(node, layout)
        return self._memo[key]

    def operand(self, node: Node, own: Layout, result: Layout) -> Any:
        """Rows of a broadcasting operand with layout `own`, shaped to combine with `result`."""
        if tags(own) == tags(result):
            return self.pull(node, own)
        if not tags(own):
            return self.full(node)
        try:
            return self.traced(
                node, lambda: gather_operand(self.full(node), own, result, self.selection)
            )
        except ValueError as error:
            raise Stop(str(error)) from None

    def call(self, node: Node, args: Any, kwargs: Any) -> Any:
        return self.traced(node, lambda: node.target(*args, **kwargs))  # type: ignore[operator]

    def linear(self, node: Node, rows: Any, weight: Node, bias: Any) -> Any:
        """Overridden where weights differ from row to row (experts)."""
        args = (rows, self.full(weight), self.full(bias))
        return self.traced(node, lambda: torch.ops.aten.linear.default(*args))

    def traced(self, node: Node, build: Callable[[], Any]) -> Any:
        """Run `build` so that new nodes carry the module path and source line of `node`."""
        with set_current_meta(node):
            return build()

    def _compute(self, node: Node, layout: Layout) -> Any:
        self.met[node] = layout
        if self._available(node):
            return self.gather(node, layout)
        rule = rule_for(node.target) if node.op == "call_function" else None
        if rule is None:
            return self._stop(node, layout, f"no push-down rule for {node.target}")
        try:
            value = rule(self, node, layout)
        except Stop as stop:
            return self._stop(node, layout, stop.reason)
        if not self._has_shape(value, layout):
            return self._stop(node, layout, f"{node.target} on rows has another shape")
        self.pulled.add(node)
        return value

    def _has_shape(self, value: Any, layout: Layout) -> bool:
        """Whether a rule gave what was asked for; sizes known only at run time are trusted."""
        if not isinstance(value, Tensor):
            return True
        wanted = selected_shape(layout, self.selection)
        if len(wanted) != value.dim():
            return False
        sizes = zip(value.shape, wanted, strict=True)
        return all(a == b for a, b in sizes if isinstance(a, int) and isinstance(b, int))

    def gather(self, node: Node, layout: Layout) -> Any:
        full = self.full(node)
        if not isinstance(full, Tensor):
            raise Stop(f"{node} is not one tensor")
        try:
            return self.traced(node, lambda: gather_rows(full, layout, self.selection))
        except ValueError as error:
            raise Stop(str(error)) from None

    def _stop(self, node: Node, layout: Layout, reason: str) -> Any:
        self.stops[node] = reason
        return self.gather(node, layout)
