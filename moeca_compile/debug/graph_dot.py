"""A matched layer as a DOT graph, and as SVG where graphviz is installed.

digraph { subgraph "blocks.0.moe" { topk [label="topk\n(f32[32, 2], i64[32, 2])" fillcolor=...] } }
One file a layer: its marked nodes and what they read. The whole graph as one picture is no picture.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from torch.fx import Node

from ..graph.dataflow import ancestors
from .graph_text import target_name, value_type
from .marks import Mark

COLOURS = {
    "attention": "#cfe3f5",
    "key_value": "#a9cdec",
    "router": "#fbe3b5",
    "experts": "#f6c1a6",
    "combine": "#f9ddcf",
    "shared expert": "#d8ecd0",
}
REFUSED = "#f3b4b4"
OUTSIDE = "#f4f4f4"
SVG_SECONDS = 20
DRAWN = ("call_function", "call_method")  # weights and inputs would hide the rest


def layer_dot(layer: str, marks: Mapping[Node, Mark]) -> str:
    """DOT of one layer. layer: its module path."""
    inside = {node for node, mark in marks.items() if mark.layer == layer}
    inside |= _between(inside)
    read = {source for node in inside for source in node.all_input_nodes}
    shown = [n for n in _in_graph_order(inside) if n in inside or (n in read and n.op in DRAWN)]
    lines = ["digraph {", 'node [shape=box style="filled,rounded" fontname="Helvetica"]']
    lines += [_node(node, marks.get(node)) for node in shown]
    for node in inside:
        sources = [source for source in node.all_input_nodes if source in shown]
        lines += [f'"{source.name}" -> "{node.name}"' for source in sources]
    return "\n".join([*lines, "}"]) + "\n"


def _between(inside: set[Node]) -> set[Node]:
    """What lies on a way from one of the nodes to another: residual adds, norms, modulation."""
    below = set[Node]()
    for node in _in_graph_order(inside):
        if node in inside or any(source in below for source in node.all_input_nodes):
            below.add(node)
    return below & ancestors(inside)


def _in_graph_order(nodes: set[Node]) -> list[Node]:
    return list(next(iter(nodes)).graph.nodes) if nodes else []


def _node(node: Node, mark: Mark | None) -> str:
    what = node.op if node.op != "call_function" else target_name(node).split(".", 2)[-1]
    label = "\\n".join(_escape(part) for part in (node.name, what, value_type(node)) if part)
    role = mark.role if mark else ""
    colour = COLOURS.get(role, REFUSED if role.startswith("not matched") else OUTSIDE)
    return f'"{node.name}" [label="{label}" fillcolor="{colour}" tooltip="{_escape(role)}"]'


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def write_svg(dot: Path) -> str:
    """`x.dot` -> `x.svg` beside it; why not, if there is none."""
    tool = shutil.which("dot")
    if tool is None:
        return "graphviz is not installed"
    command = [tool, "-Tsvg", str(dot), "-o", str(dot.with_suffix(".svg"))]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=SVG_SECONDS)
    except subprocess.TimeoutExpired:
        return f"dot took more than {SVG_SECONDS} s"
    except subprocess.CalledProcessError as error:
        return error.stderr.decode(errors="replace").strip()
    return ""
