"""Demand-driven evaluation of a graph with some nodes replaced.

Evaluator(inputs, replace={root: build}).value(node)    # build() instead of the node's own op
evaluator.view(changed={attn: stale}, below)            # the same graph on another value of attn
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.traceback import set_current_meta


@dataclass(frozen=True)
class _Later:
    make: Callable[[], Any]


class Evaluator:
    """Values of nodes, each computed once. Under tracing this emits a new graph."""

    def __init__(self, gm: GraphModule, inputs: dict[Node, Any]):
        self.gm = gm
        self._memo: dict[Node, Any] = dict(inputs)
        self._replace: dict[Node, Callable[[], None]] = {}
        self._after: dict[Node, Callable[[Any], None]] = {}

    def replace(self, node: Node, build: Callable[[], None]) -> None:
        """When `node` is first needed, call `build`, which must `set` it."""
        self._replace[node] = build

    def restore(self, node: Node) -> None:
        """Undo `replace`: the node's own op counts again."""
        self._replace.pop(node, None)

    @property
    def replaced(self) -> frozenset[Node]:
        """Nodes whose own op does not count, as of now."""
        return frozenset(self._replace)

    def after(self, node: Node, act: Callable[[Any], None]) -> None:
        """When `node` first has a value, hand it to `act` as well."""
        self._after[node] = act

    def set(self, node: Node, value: Any) -> None:
        self._memo[node] = value

    def adopt(self, node: Node, make: Callable[[], Any]) -> None:
        """`set` a value for which all that is to happen after it has happened; made when it is
        first asked for."""
        self._after.pop(node, None)
        self._memo[node] = _Later(make)

    @property
    def known(self) -> Collection[Node]:
        """The nodes that have a value, inputs included."""
        return self._memo.keys()

    def has(self, node: Node) -> bool:
        """Whether the node has a value."""
        return node in self._memo

    def run_own(self, node: Node) -> Any:
        """The node's own op, replaced or not."""
        return run_node(self.gm, node, self.value)

    def value(self, node: Any) -> Any:
        """The value of a node (constants pass through)."""
        if not isinstance(node, Node):
            return node
        if node not in self._memo:
            if node in self._replace:
                self._replace[node]()
            else:
                self._memo[node] = self.run_own(node)
            if node in self._after:
                self._after.pop(node)(self._memo[node])
        found = self._memo[node]
        if isinstance(found, _Later):
            found = self._memo[node] = found.make()
        return found

    def view(self, changed: dict[Node, Any], below: set[Node]) -> Callable[[Any], Any]:
        """Values of the same graph with the nodes in `changed` replaced; `below`: all that depends
        on them. What does not depend on them is shared with this evaluator."""
        memo = dict(changed)

        def value(node: Any) -> Any:
            if not isinstance(node, Node) or (node not in below and node not in memo):
                return self.value(node)
            if node not in memo:
                memo[node] = run_node(self.gm, node, value)
            return memo[node]

        return value


def run_node(gm: GraphModule, node: Node, value: Callable[[Any], Any]) -> Any:
    """Run one node's own op; new nodes carry its module path and source line."""
    if node.op == "get_attr":
        return getattr(gm, str(node.target))
    if node.op != "call_function":
        raise ValueError(f"{node.op} {node.name} has no value: not an input of this variant")
    args = torch.fx.map_arg(node.args, value)
    kwargs = torch.fx.map_arg(node.kwargs, value)
    with set_current_meta(node):
        return node.target(*args, **kwargs)  # type: ignore[operator]
