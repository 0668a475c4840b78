"""Sizes that were read from data and are not needed any more.

A rewrite that computes rows without cutting them at run time leaves behind numbers, and assertions
about them. Assertions have an effect, so dead code elimination leaves both alone.

    before:  u0 = item(counts[0]);  assert u0 >= 0      (no tensor is cut by u0 any more)
    after:   -
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..torch_compat import leaves


def is_size(node: Node) -> bool:
    """A number made of numbers or read from a tensor, or an assertion about one."""
    value = node.meta.get("val")
    called = node.op == "call_function"
    return called and not isinstance(value, (Tensor, tuple, list))


def erase_sizes(gm: GraphModule) -> None:
    """Erase numbers that no tensor depends on, with the assertions about them alone."""
    sizes = [n for n in gm.graph.nodes if is_size(n)]
    left = set(sizes)
    used = {n for n in sizes if any(u not in left for u in n.users)}
    while grown := {n for n in sizes if n not in used and _touches(n, used, left)}:
        used |= grown
    for node in reversed(sizes):
        if node not in used:
            gm.graph.erase_node(node)


def _touches(node: Node, used: set[Node], sizes: set[Node]) -> bool:
    """Whether a used number is made of this one, or this asserts something about a used number."""
    if any(u in used for u in node.users):
        return True
    return not node.users and any(n in used for n in node.all_input_nodes if n in sizes)


def fix_sizes(gm: GraphModule) -> None:
    """Sizes that followed from others known at run time only, where the others are known now."""
    for node in gm.graph.nodes:
        if node.op != "call_function" or not _is_open(node.meta.get("val")):
            continue
        if not any(_is_open(n.meta.get("val")) or is_size(n) for n in node.all_input_nodes):
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            with _mode(node), torch.no_grad():
                node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def _is_open(value: Any) -> bool:
    tensors = [v for v in leaves(value)[0] if isinstance(v, Tensor)]
    return any(not isinstance(size, int) for tensor in tensors for size in tensor.shape)


def _mode(node: Node) -> Any:
    return next(v for v in leaves(node.meta["val"])[0] if isinstance(v, Tensor)).fake_mode  # type: ignore[attr-defined]
