"""A Dynamo graph as JSON and back: same nodes, same names, same source lines, no user code.

{"op": "call_function", "name": "linear", "target": "python:torch._C._nn:linear",
 "args": [{"node": "x"}, {"node": "w"}], "stack": "File ...", "modules": {"k": ["L['self']", "M"]}}

Not `torch.save(gm)`: unpickling traces the code again and loses names, sources and autocast calls.
"""

from __future__ import annotations

import builtins
import importlib
import math
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from ..torch_compat import NATIVE_FUNCTIONS, dispatched_name

SPACES = (
    torch, torch.nn.functional, NATIVE_FUNCTIONS, torch.linalg, torch.fft, operator, math, builtins,
    torch.Tensor,
)  # fmt: skip
TORCH_VALUES = (torch.dtype, torch.layout, torch.memory_format)


class NotSerialisable(Exception):
    """Something in the graph exists in the user's program only; the message names it."""


def graph_to_json(gm: GraphModule) -> dict[str, Any]:
    """Nodes in order and the graphs they call. Raises NotSerialisable."""
    return {
        "nodes": [_encode_node(node) for node in gm.graph.nodes],
        "children": {
            name: graph_to_json(child)
            for name, child in gm.named_children()
            if isinstance(child, GraphModule)
        },
    }


def graph_from_json(data: dict[str, Any], attributes: dict[str, Tensor]) -> GraphModule:
    """The graph again. attributes: tensors that `get_attr` nodes read, by name."""
    root = nn.Module()
    for name, child in data["children"].items():
        root.add_module(name, graph_from_json(child, {}))
    for name, value in attributes.items():
        root.register_buffer(name, value)
    graph, known = Graph(), dict[str, Node]()
    for each in data["nodes"]:
        args, kwargs = _decode(each["args"], known), _decode(each["kwargs"], known)
        node = graph.create_node(
            each["op"], _decode_target(each["target"]), args, kwargs, each["name"]
        )
        known[each["name"]] = node
        if each["stack"]:
            node.meta["stack_trace"] = each["stack"]
        if each["modules"]:
            node.meta["nn_module_stack"] = {k: tuple(v) for k, v in each["modules"].items()}
    return GraphModule(root, graph)


def _encode_node(node: Node) -> dict[str, Any]:
    modules = node.meta.get("nn_module_stack") or {}
    return {
        "op": node.op,
        "name": node.name,
        "target": _encode_target(node),
        "args": _encode(node.args, node),
        "kwargs": _encode(node.kwargs, node),
        "stack": node.meta.get("stack_trace") or "",
        "modules": {key: [str(path), str(kind)] for key, (path, kind) in modules.items()},
    }


def _encode_target(node: Node) -> str:
    target = node.target
    if isinstance(target, str):
        return f"name:{target}"
    operator_name = dispatched_name(target)
    if operator_name:
        return f"ops:{operator_name}"
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", "")
    known = str(module).split(".")[0] in ("torch", "moeca_compile", "_operator", "math")
    if known and _lookup(str(module), name) is target:
        return f"python:{module}:{name}"
    for space in SPACES:
        if getattr(space, getattr(target, "__name__", ""), None) is target:
            where = "torch" if space is torch.Tensor else space.__name__
            prefix = "Tensor." if space is torch.Tensor else ""
            return f"python:{where}:{prefix}{target.__name__}"
    raise NotSerialisable(f"node {node.name} calls {target!r}, which is not torch's")


def _lookup(module: str, name: str) -> Any:
    try:
        return reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        return None


def _decode_target(text: str) -> Any:
    kind, _, rest = text.partition(":")
    if kind == "name":
        return rest
    if kind == "ops":
        return reduce(getattr, rest.split("."), torch.ops)
    module, _, name = rest.partition(":")
    return reduce(getattr, name.split("."), importlib.import_module(module))


def _encode(value: Any, node: Node) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        items = [_encode(v, node) for v in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        return {"dict": [[k, _encode(v, node)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_encode(v, node) for v in (value.start, value.stop, value.step)]}
    if value is ...:
        return {"ellipsis": True}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, TORCH_VALUES):
        return {"torch": str(value).removeprefix("torch.")}
    kind = type(value).__name__
    raise NotSerialisable(f"node {node.name} has an argument of type {kind}: {value!r}")


def _decode(value: Any, known: dict[str, Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, known) for v in value]
    if not isinstance(value, dict):
        return value
    (kind, content) = next(iter(value.items()))
    decoders: dict[str, Callable[[], Any]] = {
        "node": lambda: known[content],
        "tuple": lambda: tuple(_decode(v, known) for v in content),
        "dict": lambda: {k: _decode(v, known) for k, v in content},
        "slice": lambda: slice(*(_decode(v, known) for v in content)),
        "ellipsis": lambda: ...,
        "device": lambda: torch.device(content),
        "torch": lambda: getattr(torch, content),
    }
    return decoders[kind]()
