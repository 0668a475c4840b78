"""The end of a dispatch: the product of branch outputs with router weights, summed over slots."""

from __future__ import annotations

from typing import cast

import torch
from torch.fx import Node

from ..graph.dry_run import dry_pull
from ..graph.layout import RowSpace, row_layout, tags
from ..graph.region import NoMatch, RowRoot, module_path
from ..graph.row_rules import shape_of
from ..torch_compat import leaves
from .combine_ops import CONTRACTIONS, PRODUCTS, THROUGH

aten = torch.ops.aten


def find_combine(routed: Node, tokens: int, top_k: int) -> tuple[Node, Node] | NoMatch:
    """(combine node, router weights node): the product of branch outputs with [T, K] weights."""

    def miss(reason: str, node: Node) -> NoMatch:
        return NoMatch("moe", module_path(routed), reason, node)

    node = routed
    while True:
        if len(node.users) != 1:
            return miss(
                "the branch outputs are used in several places before they are weighted", node
            )
        (user,) = node.users
        if user.target in THROUGH:
            node = user
            continue
        break
    if user.target not in PRODUCTS | CONTRACTIONS:
        return miss(f"expected branch outputs times router weights, found {user.target}", user)
    operands = [a for a in leaves(user.args)[0] if isinstance(a, Node)]
    other = [a for a in operands if a is not node]
    if len(other) != 1:
        return miss("branch outputs are not multiplied by one tensor of router weights", user)
    weights = other[0]
    while weights.target in THROUGH and sorted(shape_of(weights)) != sorted((tokens, top_k)):
        weights = cast(Node, weights.args[0])
    if shape_of(weights) not in ([tokens, top_k], [tokens * top_k]) and (
        [s for s in shape_of(weights) if s != 1] != [s for s in (tokens, top_k) if s != 1]
    ):
        return miss(
            f"router weights of shape {shape_of(weights)}, expected {[tokens, top_k]}", user
        )
    summed = _summed_over_slots(user, top_k) or _contracts_slots(user, node, tokens, top_k)
    if top_k > 1 and not summed:
        return miss("weighted branches are not summed over the slots of a token", user)
    return user, weights


def _summed_over_slots(product: Node, top_k: int) -> bool:
    """The order of the slots must not matter: the product ends in a sum over them."""
    node = product
    while len(node.users) == 1:
        (user,) = node.users
        if user.target is aten.sum.dim_IntList:
            shape = shape_of(node)
            dims = [d % len(shape) for d in user.args[1]]  # type: ignore[union-attr]
            return len(shape) > 2 and dims == [len(shape) - 2] and shape[dims[0]] == top_k
        if user.target not in THROUGH:
            return False
        node = user
    return False


def _contracts_slots(contraction: Node, branches: Node, tokens: int, top_k: int) -> bool:
    """Row t of a contraction comes from all branches of token t, [T, K, D] -> [T, D]."""
    space = RowSpace(1, tokens)
    layout = row_layout(shape_of(contraction), space)
    sizes = [n.meta["val"].numel() for n in (contraction, branches)]
    if contraction.target not in CONTRACTIONS or layout is None or sizes[0] * top_k != sizes[1]:
        return False
    dry = dry_pull([RowRoot(contraction, layout)], set(contraction.all_input_nodes), space)
    return dry is not None and bool(tags(dry.requested.get(branches, ((),))[0]))
