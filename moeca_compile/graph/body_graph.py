"""Pieces of an expert's body as a graph on rows [T, Din]: its input, copies of nodes, its end."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from .choice_dispatch import NotChoice
from .row_rules import shape_of


def rows_hole(graph: Graph, tokens: int, piece: Node) -> Node:
    """The placeholder of the rows, shaped as `piece` but for their number."""
    value = piece.meta["val"]
    hole = graph.placeholder("rows_0")
    hole.meta = {"val": value.new_empty(tokens, value.shape[-1])}
    return hole


def copied(graph: Graph, node: Node, values: dict[Node, Node]) -> Node:
    """A copy of the node in `graph`, evaluated. Raises NotChoice."""
    if node.op != "call_function":
        raise NotChoice(f"an expert reads {node.op} {node.target}", node)
    copy = graph.node_copy(node, values.__getitem__)
    return evaluated(copy, node)


def evaluated(copy: Node, origin: Node) -> Node:
    """The copy with its value on rows [T, ...]. Raises NotChoice."""
    args, kwargs = torch.fx.map_arg((copy.args, copy.kwargs), lambda n: n.meta["val"])
    try:
        value = copy.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise NotChoice(f"an expert does not work on single rows: {error}", origin) from None
    copy.meta = {**origin.meta, "val": value}
    return copy


def finish(graph: Graph, result: Node, tokens: int, out: Node) -> None:
    """Make `result` the output [T, Dout]. Raises NotChoice where rows lost their shape."""
    if shape_of(result) != [tokens, int(out.meta["val"].shape[-1])]:
        raise NotChoice("an expert changes the shape of its rows", out)
    graph.output((result,))
    graph.lint()
