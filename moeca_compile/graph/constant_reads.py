"""Numbers that a model reads from tensors which depend on no input, known when the graph is.

    sizes = torch.tensor([4, 2]).unsqueeze(0).repeat(2, 1)    4 and 2 in every call of these shapes
    for h, w in sizes: x[i, : h * w].reshape(1, h, w, -1)  ->  x[i, :8].reshape(1, 4, 2, -1)

Such tensors are made of Python numbers, most often of shapes, and Dynamo guards on those. Without
this the numbers would be symbols of the graph, and with them every size behind.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

_READS = ("item",)
_FUNCTIONS = (
    torch.tensor, torch.arange, torch.full, torch.zeros, torch.ones, torch.stack, torch.cat,
    operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv,
)  # fmt: skip
_METHODS = (
    "reshape", "view", "flatten", "unsqueeze", "squeeze", "repeat", "expand", "unbind", "select",
    "to", "long", "int", "prod", "sum", "max", "min", "cumsum", "item",
)  # fmt: skip
_SIZED = ("reshape", "view", "expand", "repeat", "unflatten", operator.getitem)
_CHECKS = ("_assert_scalar", "sym_constrain_range", "_check")


def constants(gm: GraphModule, values: Sequence[Any]) -> dict[Node, Any]:
    """Nodes of `gm` that depend on no tensor input, with what they give.

    values: of the placeholders; numbers among them count as constants, tensors do not.
    """
    known: dict[Node, Any] = {}
    holes = iter(values)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            value = next(holes)
            if isinstance(value, (int, float, torch.SymInt)):
                known[node] = int(value) if isinstance(value, torch.SymInt) else value
        elif _is_plain(node) and all(source in known for source in node.all_input_nodes):
            known[node] = _evaluate(node, known)
    return known


def reads_numbers(gm: GraphModule) -> bool:
    """Whether `gm` reads any number from a tensor."""
    return any(_reads(n, {}) for n in gm.graph.nodes)


def open_reads(gm: GraphModule, values: Sequence[Any]) -> list[Node]:
    """Nodes that read a number that does depend on a tensor input."""
    known = constants(gm, values)
    return [n for n in gm.graph.nodes if n not in known and _reads(n, known)]


class WithConstants(Interpreter):
    """Runs a graph in which numbers read from the tensors that are `known` are numbers."""

    def __init__(self, gm: GraphModule, known: dict[Node, Any]) -> None:
        super().__init__(gm)
        self._known = known

    def run_node(self, n: Node) -> Any:
        if n.target in _READS and n in self._known:
            return self._known[n]
        if self._known and _is_check(n):
            args, _ = self.fetch_args_kwargs_from_env(n)
            if not any(isinstance(a, (torch.SymInt, torch.SymBool, Tensor)) for a in args):
                return None  # of a number that is no symbol any more
        return super().run_node(n)

    def fetch_args_kwargs_from_env(self, n: Node) -> Any:
        if not self._known or n.target not in _SIZED:
            return super().fetch_args_kwargs_from_env(n)
        return torch.fx.map_arg((n.args, n.kwargs), self._size)

    def _size(self, source: Node) -> Any:
        value = self._known.get(source)
        if isinstance(value, Tensor) and _is_number(value):
            return int(value)
        return self.env[source]


def _reads(node: Node, known: dict[Node, Any]) -> bool:
    """Whether a number is read from a tensor that is not known."""
    if node.target in _READS:
        return True
    if node.target not in _SIZED:
        return False
    sizes = node.all_input_nodes[1:]
    return any(s not in known and _is_number(s.meta.get("example_value")) for s in sizes)


def _is_number(value: Any) -> bool:
    """Whether `value` is an integer in a tensor."""
    return (
        isinstance(value, Tensor) and not value.dim() and value.dtype in (torch.int64, torch.int32)
    )


def _is_plain(node: Node) -> bool:
    if node.op == "call_function":
        return node.target in _FUNCTIONS
    return node.op == "call_method" and node.target in _METHODS


def _is_check(node: Node) -> bool:
    name = getattr(node.target, "__name__", str(node.target))
    return node.op == "call_function" and name.startswith(_CHECKS)


def _evaluate(node: Node, known: dict[Node, Any]) -> Any:
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), known.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]
