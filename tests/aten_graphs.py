"""Graphs as the passes meet them, and what tests ask of a graph.

graph = traced(model, *inputs)           # Dynamo -> pre-dispatch ATen
before = graph.run()
NormalizeGathered().run(graph.gm)
after = graph.run()
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, map_arg
from torch.utils import _pytree as pytree

from moeca_compile.graph.counterparts import looks
from moeca_compile.graph.experts import routed_experts
from moeca_compile.graph.region import ORIGIN
from moeca_compile.graph.retrace import retrace


@dataclass
class TracedGraph:
    """An ATen graph and the values of its inputs."""

    gm: GraphModule
    values: list[Any]

    @torch.no_grad()
    def run(self) -> Tensor:
        return self.gm(*self.values)[0]

    @torch.no_grad()
    def run_float32(self) -> Tensor:
        """The same computation with every bfloat16 value and cast replaced by float32."""
        values = pytree.tree_map_only(Tensor, _widened, self.values)
        return in_float32(self.gm)(*values)[0]

    def text(self) -> str:
        return str(self.gm.graph)

    @property
    def targets(self) -> Counter[Any]:
        return Counter(n.target for n in self.gm.graph.nodes if n.op == "call_function")

    @property
    def routed(self) -> list[Node]:
        return [n for n in self.gm.graph.nodes if n.target is routed_experts]

    def largest(self) -> int:
        """Elements of the largest value computed in the graph."""
        found = [n.meta["val"] for n in self.gm.graph.nodes if n.op == "call_function"]
        return max(v.numel() for v in found if isinstance(v, Tensor))


def traced(function: Callable[..., Any], *args: Any) -> TracedGraph:
    """One graph of a model or function, or an error if Dynamo breaks it."""
    found: list[TracedGraph] = []

    def backend(gm: GraphModule, values: list[Any]) -> Callable[..., Any]:
        found.append(TracedGraph(retrace(gm, values).gm, list(values)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*args)
    (graph,) = found
    return graph


def in_float32(gm: GraphModule) -> GraphModule:
    """A copy with bfloat16 constants replaced; expert bodies included."""
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    owner = torch.nn.Module()
    for node in graph.nodes:
        node.args = pytree.tree_map_only(torch.dtype, _wide, node.args)
        node.kwargs = pytree.tree_map_only(torch.dtype, _wide, node.kwargs)
        if node.op == "get_attr":
            setattr(owner, node.target, in_float32_body(getattr(gm, node.target)))
    return GraphModule(owner, graph)


def in_float32_body(body: GraphModule) -> GraphModule:
    """The same for an expert body, whose placeholders' values say how many rows there are."""
    copy = in_float32(body)
    for old, new in zip(body.graph.nodes, copy.graph.nodes, strict=True):
        new.meta = dict(old.meta)
    return copy


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.bfloat16 else dtype


def _widened(value: Tensor) -> Tensor:
    return value.to(_wide(value.dtype))


def described(gm: GraphModule) -> list[Any]:
    """Every node by op, arguments, look and where it comes from. Symbols have no names."""
    place = {node: f"%{i}" for i, node in enumerate(gm.graph.nodes)}
    return [
        (
            node.op,
            str(node.target) if node.op != "placeholder" else "",
            repr(map_arg((node.args, node.kwargs), place.__getitem__)),
            re.sub(r"\bu\d+", "u", str(looks(node.meta.get("val")))),
            [str(node.meta.get(key)) for key in ORIGIN] if node.op == "call_function" else [],
        )
        for node in gm.graph.nodes
    ]
