"""A graph as text to read and to compare: one node a line, with all that is known about it.

linear_6: "f32[64, 48]" = torch.ops.aten.linear.default(rows, arg19_1, arg20_1)  # blocks.0.moe
                                                    ... model.py:52  [blocks.0.moe experts]
getitem_1: "f32[2, 1, 32]" = chunk[1]               dtype, shape; module path; source line; mark
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ..graph.region import module_path, source_line
from ..torch_compat import dispatched_name

Marks = Mapping[Node, str]
_SHORT = (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "i"), ("complex", "c"))


def graph_text(gm: GraphModule, marks: Marks | None = None) -> str:
    """`gm` and the graphs it calls. marks: a word behind the nodes that have one."""
    files: dict[str, str] = {}
    parts = [_one(gm.graph, marks or {}, files)]
    for name, child in gm.named_children():
        if isinstance(child, GraphModule):
            parts.append(f"# {name}\n{_one(child.graph, marks or {}, files)}")
    heads = [f"# {short} is {path}" for path, short in files.items()]
    return "\n\n".join(["\n".join(heads), *parts] if heads else parts)


def _one(graph: Graph, marks: Marks, files: dict[str, str]) -> str:
    return "\n".join(_line(node, marks, files) for node in graph.nodes)


def _line(node: Node, marks: Marks, files: dict[str, str]) -> str:
    code = node_code(node)
    notes = [module_path(node) if node.meta.get("nn_module_stack") else ""]
    notes.append(_short_place(source_line(node), files))
    notes.append(f"[{marks[node]}]" if node in marks else "")
    comment = "  ".join(n for n in notes if n)
    return f"{code:<100}  # {comment}" if comment else code


def _short_place(place: str, files: dict[str, str]) -> str:
    """`/long/way/model.py:52` -> `model.py:52`; another file of that name keeps its path."""
    path, _, line = place.rpartition(":")
    if not path:
        return ""
    short = files.get(path)
    if short is None:
        name = path.rsplit("/", 1)[-1]
        short = files[path] = path if name in files.values() else name
    return f"{short}:{line}"


def node_code(node: Node) -> str:
    """`name: "dtype[shape]" = call`, without a comment."""
    if node.op == "output":
        return f"return {_value(node.args[0])}"
    shown = value_type(node)
    return f'{node.name}: "{shown}" = {_call(node)}' if shown else f"{node.name} = {_call(node)}"


def value_type(node: Node) -> str:
    """`f32[2, 16]` of the node's value, `(f32[2], i64[2])` of several; "" where it is not known."""
    return _type(node.meta.get("val", node.meta.get("example_value")))


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{_dtype(value.dtype)}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        inner = [_type(v) for v in value]
        return f"({', '.join(inner)})" if any(inner) else ""
    return f"Sym({value})" if isinstance(value, (torch.SymInt, torch.SymFloat)) else ""


def _dtype(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    for long, short in _SHORT:
        if re.fullmatch(rf"{long}\d+\w*", name):
            return name.replace(long, short, 1)
    return name


def _call(node: Node) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return f"self.{node.target}"
    if node.target is operator.getitem:
        return f"{_value(node.args[0])}[{_value(node.args[1])}]"
    args = [_value(a) for a in node.args]
    args += [f"{name}={_value(value)}" for name, value in node.kwargs.items()]
    if node.op == "call_method":
        return f"{args[0]}.{node.target}({', '.join(args[1:])})"
    return f"{target_name(node)}({', '.join(args)})"


def target_name(node: Node) -> str:
    """What a node calls, as one would write it: `torch.ops.aten.linear.default`."""
    target = node.target
    operator_name = dispatched_name(target)
    if operator_name:
        return f"torch.ops.{operator_name}"
    if not callable(target):
        return f"self.{target}"
    module = getattr(target, "__module__", "") or ""
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", repr(target))
    return f"{module.lstrip('_')}.{name}" if module else str(name)


def _value(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        inner = ", ".join(_value(v) for v in value)
        comma = "," if len(value) == 1 else ""
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{comma})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {_value(v)}' for k, v in value.items())}}}"
    if isinstance(value, slice):
        return f"slice({_value(value.start)}, {_value(value.stop)}, {_value(value.step)})"
    return value.name if isinstance(value, Node) else repr(value)
