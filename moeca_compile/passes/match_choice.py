"""Chosen experts -> their region: gates, combine, and what else the picks decide.

    [R, D] chosen_experts -> casts, views -> * gates [R, 1] -> scatter_add, index_add      combine
    [B, E, C, D] chosen_experts -> einsum("becn,bec,becd->bnd", ones, gates, out)          combine

The outputs may only be scaled and summed: a place without a branch counts as a row of zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..graph.branch_order import SHAPED
from ..graph.chosen import Groups
from ..graph.dataflow import ancestors, descendants
from ..graph.experts import num_experts_of
from ..graph.index_rules import JOINS
from ..graph.layout import RowSpace
from ..graph.region import AttentionRegion, ChoiceRegion, NoMatch, module_path
from ..graph.row_rules import shape_of
from ..graph.rule_base import argument
from ..graph.view_rules import PERMUTES
from ..torch_compat import leaves
from .combine_ops import ADDS_ROWS, CASTS, CONTRACTIONS, PRODUCTS, THROUGH

aten = torch.ops.aten
SHAPED_AS = {aten.expand_as.default, aten.view_as.default, aten.reshape_as.default}
RANKS = {aten.topk.default, aten.argsort.stable}


def draft_choice(chosen: Node, attention: list[AttentionRegion]) -> ChoiceRegion | NoMatch:
    """The region of one chosen node, without attention and shared experts."""
    args: Any = chosen.args
    _, places, rows, params, groups = args[:5]
    found = find_gates(chosen)
    if isinstance(found, NoMatch):
        return found
    combine, weights = found
    tokens = shape_of(rows[0])[0]
    space = next((a.space for a in attention if a.space.rows == tokens), RowSpace(1, tokens))
    experts = num_experts_of(params)
    return ChoiceRegion(
        name=module_path(chosen),
        space=space,
        routed=chosen,
        ids=places,
        weights=weights,
        rows=tuple(rows),
        combine=combine,
        num_experts=experts,
        top_k=experts,
        places=shape_of(places)[0],
        chosen=Groups(*groups),
        beside=_decided(chosen, combine),
        valid=args[5] if len(args) > 5 else None,
    )


def find_gates(chosen: Node) -> tuple[Node, Node] | NoMatch:
    """(combine, gates in the order of the places)."""

    def miss(reason: str, node: Node) -> NoMatch:
        return NoMatch("moe", module_path(chosen), f"expert choice: {reason}", node)

    node, gates, ordered = chosen, None, True
    while True:
        readers = [u for u in node.users if not _reads_shape(u, node)]
        if len(readers) != 1:
            return miss("the experts' outputs are used in several places", node)
        (user,) = readers
        if user.target in THROUGH or _adds_nothing(user, node):
            ordered = ordered and user.target not in PERMUTES
        elif user.target in PRODUCTS:
            others = [a for a in user.args if isinstance(a, Node) and a is not node]
            gate = _gate(others[0], shape_of(node)[:-1]) if others and ordered else None
            if gate is None:
                return miss("the experts' outputs are multiplied by other than one gate each", user)
            gates = gates or gate
        else:
            break
        node = user
    if not _sums(user, node):
        return miss(f"expected a sum over the experts' outputs, found {user.target}", user)
    gates = gates or (_gates_of_contraction(user, node) if ordered else None)
    if gates is None:
        return miss("no gates, one for each output, are found at the combine", user)
    return user, gates


def _adds_nothing(user: Node, node: Node) -> bool:
    """Whether `user` joins the rows with others of which there are none."""
    joins = user.target in JOINS | {aten.vstack.default}
    return joins and shape_of(user) == shape_of(node)


def _reads_shape(user: Node, node: Node) -> bool:
    """Whether only the shape of `node` matters to `user`."""
    like = user.target in SHAPED_AS and user.args[0] is not node
    return like or user.target in SHAPED


def _gate(operand: Node, lead: list[int]) -> Node | None:
    """The gates if `operand` broadcasts one for each place, dims `lead`, over the features."""
    node: Any = operand
    while node.target in (aten.expand.default, aten.expand_as.default):
        node = node.args[0]
    return node if shape_of(node) == [*lead, 1] else None


def _sums(node: Node, rows: Node) -> bool:
    """Whether `node` is linear in `rows`, its summands or one operand of its product."""
    args: Any = node.args
    if node.target is aten.sum.dim_IntList:
        return True
    if node.target in CONTRACTIONS:
        return [a for a in leaves(args)[0] if isinstance(a, Node)].count(rows) == 1
    if node.target not in ADDS_ROWS:
        return False
    if node.target is aten.index_put.default:
        return args[2] is rows and bool(argument(node, 3, "accumulate", False))
    if node.target is aten.scatter_reduce.two:
        return args[3] is rows and args[4] == "sum" and argument(node, 5, "include_self", True)
    return args[3] is rows


def _gates_of_contraction(contraction: Node, rows: Node) -> Node | None:
    """Gates that are an operand of their own, or a factor of the zeros and ones."""
    args: Any = contraction.args
    lead = shape_of(rows)[:-1]
    if contraction.target is aten.einsum.default and "." not in args[0]:
        sides = str(args[0]).replace(" ", "").split("->")[0].split(",")
        of = dict(zip(args[1], sides, strict=True))
        others = [n for n in of if n is not rows]
        alone = [n for n in others if of[n] == of[rows][:-1]]
        if alone:
            return alone[0]
        others = [n for n in others if of[n][:-1] == of[rows][:-1]]
    else:
        others = []
    for other in others:
        while other.target in CASTS:
            other = other.args[0]
        if other.target in PRODUCTS:
            found = [_gate(a, lead) for a in other.args if isinstance(a, Node)]
            return next((g for g in found if g is not None), None)
    return None


def _decided(chosen: Node, combine: Node) -> tuple[Node, ...]:
    """What the combine reads that follows from the picks: their numbers, ones, gates."""
    graph = list(chosen.graph.nodes)
    above = ancestors([chosen.args[1]])  # type: ignore[list-item]
    ranks = [n for n in graph if n in above and n.target in RANKS]
    picked = descendants(ranks[-1]) if ranks else set()
    inside = descendants(chosen) & ancestors([combine])
    read = {n for node in inside if node is not chosen for n in node.all_input_nodes}
    return tuple(n for n in graph if n in (read - inside) & picked)
