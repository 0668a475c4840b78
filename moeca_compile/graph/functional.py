"""In-place ops of the user's code as out-of-place ones, so that values can be moved and cached.

    before:  y = aten.add_.Tensor(x [T, D] bf16, r f32)      (x is not read afterwards)
    after:   y = aten.to.dtype(aten.add.Tensor(x, r), bf16)

    before:  aten.mul_.Tensor(aten.select.int(x, 1, 0), 2);  x is read afterwards
    after:   x' = aten.select_scatter.default(x, aten.mul.Tensor(..), 1, 0);  x' is read

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
# A view that takes part of a tensor -> the op that puts the part back.
PUT_BACK: dict[Any, Any] = {
    aten.select.int: aten.select_scatter.default,
    aten.slice.Tensor: aten.slice_scatter.default,
}


class Mutation(Exception):
    """A write that cannot be made functional; `node` is where it happens."""

    def __init__(self, reason: str, node: Node):
        super().__init__(reason)
        self.node = node


def make_functional(gm: GraphModule) -> int:
    """Replace in-place ops; returns how many. Raises Mutation where that changes the result."""
    if not any(map(mutates, gm.graph.nodes)):
        return 0
    through = [n for n in gm.graph.nodes if mutates(n) and _part_of(n)]
    for node in through:
        _write_part(gm, node)
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    aliases = _by_storage(gm)
    changed = 0
    for node in list(gm.graph.nodes):
        if not mutates(node):
            continue
        target = _functional(node)
        _check_aliases(node, aliases, order)
        _replace(gm, node, target)
        changed += 1
    return changed + len(through)


def _part_of(node: Node) -> list[Node]:
    """The views through which a node writes to part of a tensor, outermost first."""
    views, written = [], node.args[0]
    while isinstance(written, Node) and written.target in PUT_BACK:
        views.append(written)
        written = written.args[0]
    return views


def _write_part(gm: GraphModule, node: Node) -> None:
    """The functional op on the part, and the part put back for those who read the whole later."""
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    views = _part_of(node)
    whole: Any = views[-1].args[0]
    _check_aliases(node, _by_storage(gm), order, known=whole)
    new = _replace(gm, node, _functional(node))
    with node.meta["val"].fake_mode:
        new.meta["val"] = torch.empty_like(new.meta["val"])  # no longer the memory of the whole
    for view in views:
        with gm.graph.inserting_after(new):
            put = gm.graph.call_function(PUT_BACK[view.target], (view.args[0], new, *view.args[1:]))
        args = torch.fx.map_arg(put.args, lambda n: n.meta["val"])
        with node.meta["val"].fake_mode, torch.no_grad():
            put.meta = {**node.meta, "val": put.target(*args)}  # type: ignore[operator]
        new = put
    whole.replace_all_uses_with(new, delete_user_cb=lambda u: order.get(u, -1) > order[node])


def mutates(node: Node) -> bool:
    """Whether the node writes to one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema and schema.is_mutable)


def _functional(node: Node) -> Any:
    name, overload = str(node.target).removeprefix("aten.").rsplit(".", 1)
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    found = getattr(packet, overload, None) if packet is not None else None
    if found is None:
        raise Mutation(f"{node.target} writes in place and has no functional form", node)
    return found


def _replace(gm: GraphModule, node: Node, target: Any) -> Node:
    """The functional op; an in-place op also keeps the written tensor's dtype."""
    wanted, promoted = node.meta["val"], None
    with wanted.fake_mode, torch.no_grad():
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        promoted = target(*args, **kwargs)
    node.target = target
    if promoted.dtype == wanted.dtype:
        return node
    with gm.graph.inserting_after(node):
        cast = gm.graph.call_function(aten.to.dtype, (node, wanted.dtype))
    cast.meta = dict(node.meta)
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    node.meta["val"] = promoted
    return cast


def _by_storage(gm: GraphModule) -> dict[int, list[Node]]:
    """Nodes that share memory, whatever op made them so."""
    found: dict[int, list[Node]] = {}
    for node in gm.graph.nodes:
        # Dropout that is off returns its input, but the fake kernel makes a new tensor.
        seen = node.args[0] if node.target is aten.dropout.default else node
        for value in _tensors(seen):
            found.setdefault(storage_of(value), []).append(node)
    return found


def _tensors(node: Node) -> list[Tensor]:
    return [v for v in leaves(node.meta.get("val"))[0] if isinstance(v, Tensor)]


def storage_of(value: Tensor) -> int:
    """Equal for tensors that share memory."""
    return StorageWeakRef(value.untyped_storage()).cdata


def _check_aliases(
    node: Node,
    aliases: dict[int, list[Node]],
    order: dict[Node, int],
    known: Node | None = None,
) -> None:
    """known: an alias whose later readers are taken care of."""
    written = node.args[0]
    assert isinstance(written, Node)
    for alias in aliases[storage_of(written.meta["val"])]:
        if alias.op == "placeholder":
            raise Mutation(f"{node.target} writes to an input of the model", node)
        if alias is known or order.get(alias, order[node]) >= order[node]:
            continue
        for user in alias.users:
            if user is not node and order.get(user, 0) > order[node]:
                raise Mutation(f"{node.target} writes to a tensor that is read again", node)
