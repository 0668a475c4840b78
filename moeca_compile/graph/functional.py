"""In-place ops of the user's code as out-of-place ones, so that values can be moved and cached.

    before:  y = aten.add_.Tensor(x [T, D] bf16, r f32)      (x is not read afterwards)
    after:   y = aten.to.dtype(aten.add.Tensor(x, r), bf16)
Refused, the model then runs on plain Inductor: writes to an input, and writes to a tensor of which
another view is read later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.multiprocessing.reductions import StorageWeakRef

from ..torch_compat import leaves

aten = torch.ops.aten


class Mutation(Exception):
    """A write that cannot be made functional; `node` is where it happens."""

    def __init__(self, reason: str, node: Node):
        super().__init__(reason)
        self.node = node


def make_functional(gm: GraphModule) -> int:
    """Replace in-place ops; returns how many. Raises Mutation where that changes the result."""
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    aliases = _by_storage(gm)
    changed = 0
    for node in list(gm.graph.nodes):
        if not _mutates(node):
            continue
        target = _functional(node)
        _check_aliases(node, aliases, order)
        _replace(gm, node, target)
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


def _replace(gm: GraphModule, node: Node, target: Any) -> None:
    """The functional op; an in-place op also keeps the written tensor's dtype."""
    wanted, promoted = node.meta["val"], None
    with wanted.fake_mode, torch.no_grad():
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        promoted = target(*args, **kwargs)
    node.target = target
    if promoted.dtype == wanted.dtype:
        return
    with gm.graph.inserting_after(node):
        cast = gm.graph.call_function(aten.to.dtype, (node, wanted.dtype))
    cast.meta = dict(node.meta)
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    node.meta["val"] = promoted


def _by_storage(gm: GraphModule) -> dict[int, list[Node]]:
    """Nodes that share memory, whatever op made them so."""
    found: dict[int, list[Node]] = {}
    for node in gm.graph.nodes:
        # Dropout that is off returns its input, but the fake kernel makes a new tensor.
        seen = node.args[0] if node.target is aten.dropout.default else node
        for value in _tensors(seen):
            found.setdefault(_storage(value), []).append(node)
    return found


def _tensors(node: Node) -> list[Tensor]:
    return [v for v in leaves(node.meta.get("val"))[0] if isinstance(v, Tensor)]


def _storage(value: Tensor) -> int:
    return StorageWeakRef(value.untyped_storage()).cdata


def _check_aliases(node: Node, aliases: dict[int, list[Node]], order: dict[Node, int]) -> None:
    written = node.args[0]
    assert isinstance(written, Node)
    for alias in aliases[_storage(written.meta["val"])]:
        if alias.op == "placeholder":
            raise Mutation(f"{node.target} writes to an input of the model", node)
        if order.get(alias, order[node]) >= order[node]:
            continue
        for user in alias.users:
            if user is not node and order.get(user, 0) > order[node]:
                raise Mutation(f"{node.target} writes to a tensor that is read again", node)
