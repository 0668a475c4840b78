"""In-place ops of the user's code as out-of-place ones, so that values can be moved and cached.

    before:  y = aten.add_.Tensor(x, r)              (x is not read afterwards)
    after:   y = aten.add.Tensor(x, r)
Refused, the model then runs on plain Inductor: writes to an input, and writes to a tensor of which
another view is read later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from .row_rules import VIEWS

aten = torch.ops.aten
ALIASING = VIEWS | {
    aten.select.int,
    aten.slice.Tensor,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.narrow.default,
    aten.detach.default,
    aten.alias.default,
    aten.view_as_real.default,
    aten.view_as_complex.default,
}


class Mutation(Exception):
    """A write that cannot be made functional; `node` is where it happens."""

    def __init__(self, reason: str, node: Node):
        super().__init__(reason)
        self.node = node


def make_functional(gm: GraphModule) -> int:
    """Replace in-place ops; returns how many. Raises Mutation where that would change the result."""
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    changed = 0
    for node in list(gm.graph.nodes):
        if not _mutates(node):
            continue
        target = _functional(node)
        _check_aliases(node, order)
        node.target = target
        changed += 1
    return changed


def _mutates(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema and schema.is_mutable)


def _functional(node: Node) -> Any:
    name, overload = str(node.target).removeprefix("aten.").rsplit(".", 1)
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    found = getattr(packet, overload, None) if packet is not None else None
    if found is None:
        raise Mutation(f"{node.target} writes in place and has no functional form", node)
    return found


def _check_aliases(node: Node, order: dict[Node, int]) -> None:
    written = node.args[0]
    base = written
    while isinstance(base, Node) and _is_alias(base):
        base = base.args[0]
    if not isinstance(base, Node) or base.op != "call_function":
        raise Mutation(f"{node.target} writes to an input of the model", node)
    pending, seen = [base], {base}
    while pending:
        alias = pending.pop()
        for user in alias.users:
            if user is not node and order[user] > order[node]:
                raise Mutation(f"{node.target} writes to a tensor that is read again", node)
            if _is_alias(user) and user not in seen:
                seen.add(user)
                pending.append(user)


def _is_alias(node: Node) -> bool:
    return node.target in ALIASING or getattr(node.target, "__name__", "") == "getitem"
