"""No token names an expert twice: the cache tells the branches of a token apart by expert.

Some routers fill all slots of a token with one expert and weigh the first. The first keeps the sum
of the weights; each other slot gets an unused expert of lowest number with weight zero.

    before:  ids [[7, 7], [2, 0]]  weights [[1, 0], [.6, .3]]
    after:   ids [[7, 0], [2, 0]]  weights [[1, 0], [.6, .3]]

Left alone where the ids come from one top-k or sort over the experts: those are distinct.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..graph.experts import num_experts_of, routed_experts
from ..graph.lift_branches import inline, trace_part
from ..graph.region import NoMatch
from ..graph.routing_ids import CASTS, FLAT_VIEWS
from ..graph.row_rules import shape_of
from .base import PassReport
from .find_combine import find_combine

aten = torch.ops.aten
_RANKED = {aten.topk.default, aten.sort.default, aten.sort.stable}
_ARGSORTS = {aten.argsort.default, aten.argsort.stable}


@dataclass(frozen=True)
class DistinctExperts:
    """Make the expert numbers of a token distinct where the router may repeat one."""

    name: str = "distinct_experts"

    def run(self, gm: GraphModule) -> PassReport:
        changed = 0
        for routed in [n for n in gm.graph.nodes if n.target is routed_experts]:
            ids: Any = routed.args[1]
            tokens, slots = shape_of(ids)
            experts = num_experts_of(routed.args[3])  # type: ignore[arg-type]
            if slots == 1 or slots > experts or are_distinct(ids):
                continue
            found = find_combine(routed, tokens, slots)
            if not isinstance(found, NoMatch):
                _rewrite(gm, routed, *found, experts)
                changed += 1
        if changed:
            gm.graph.lint()
            gm.recompile()
        return PassReport(self.name, changed)


def are_distinct(ids: Node) -> bool:
    """Whether the rows of ids [T, K] are part of one ranking of the experts, or made distinct."""
    node: Any = ids
    slots = shape_of(ids)[-1]
    while True:
        name = getattr(node.target, "__name__", "")
        if name == "getitem" and node.args[1] == 1 and node.args[0].target in _RANKED:
            return _ranks_last_dim(node.args[0]) and shape_of(node)[-1] >= slots
        if node.target in _ARGSORTS:
            return _ranks_last_dim(node) and shape_of(node)[-1] >= slots
        if node.meta.get("distinct_experts"):
            return True
        if node.target is aten.slice.Tensor and node.args[1] % len(shape_of(node)) != (
            len(shape_of(node)) - 1
        ):
            return False
        if node.target not in FLAT_VIEWS | CASTS | {aten.slice.Tensor}:
            return False
        node = node.args[0]


def _ranks_last_dim(node: Node) -> bool:
    rank = len(shape_of(node.args[0]))
    position = {aten.topk.default: 2, aten.sort.stable: 2, aten.argsort.stable: 2}
    at = position.get(node.target, 1)  # type: ignore[arg-type]
    dim: Any = node.args[at] if len(node.args) > at else node.kwargs.get("dim", -1)
    return dim % rank == rank - 1 and rank > 1


def _rewrite(gm: GraphModule, routed: Node, combine: Node, weights: Node, experts: int) -> None:
    ids: Any = routed.args[1]
    value, mode = ids.meta["val"], ids.meta["val"].fake_mode

    def numbers(given: Tensor) -> tuple[Tensor, Tensor]:
        return distinct_ids(given, experts)

    with gm.graph.inserting_before(routed):
        new_ids, same = inline(gm, trace_part(numbers, [value], mode), [ids])
    new_ids.meta["distinct_experts"] = True
    routed.replace_input_with(ids, new_ids)
    shape = shape_of(weights)

    def shares(given: Tensor, equal: Tensor) -> tuple[Tensor]:
        return (merged_weights(given.reshape(value.shape), equal).reshape(shape),)

    path = _path(combine, weights)
    inputs = [weights.meta["val"], same.meta["val"]]
    with gm.graph.inserting_before(path[-1]):
        (new,) = inline(gm, trace_part(shares, inputs, mode), [weights, same])
    for node in reversed(path[1:]):  # a view of the weights that others may read too
        with gm.graph.inserting_before(combine):
            new = gm.graph.node_copy(node, lambda n, w=weights, r=new: r if n is w else n)
        weights = node
    combine.replace_input_with(weights, new)


def _path(combine: Node, weights: Node) -> list[Node]:
    """Nodes from the product's operand up to the weights' reader: [combine, .., first reader]."""
    for operand in combine.all_input_nodes:
        path, node = [combine], operand
        while node is not weights and len(node.all_input_nodes) == 1:
            path.append(node)
            node = node.all_input_nodes[0]
        if node is weights:
            return path
    raise ValueError(f"{weights.name} does not lead to {combine.name}")


def distinct_ids(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """(ids [T, K] without repeats, same [T, K, K]): same[t, k, j] if slot k stands for slot j too.

    A slot that repeats an expert stands for none.
    """
    equal = ids.unsqueeze(2) == ids.unsqueeze(1)
    slot = torch.arange(ids.shape[1], device=ids.device)
    repeated = (equal & (slot.unsqueeze(0) < slot.unsqueeze(1))).any(2)
    names = torch.arange(experts, device=ids.device, dtype=ids.dtype)
    unused = ~(ids.unsqueeze(2) == names).any(1)  # [T, E]
    place = unused.to(torch.int32).cumsum(1)
    wanted = repeated.to(torch.int32).cumsum(1)
    taken = unused.unsqueeze(1) & (place.unsqueeze(1) == wanted.unsqueeze(2))  # [T, K, E]
    spare = (taken.to(ids.dtype) * names).sum(2).to(ids.dtype)
    return torch.where(repeated, spare, ids), equal & ~repeated.unsqueeze(2)


def merged_weights(weights: Tensor, same: Tensor) -> Tensor:
    """[T, K]: each slot's weight plus those of the slots it stands for."""
    parts = torch.where(
        same, weights.unsqueeze(1), torch.zeros((), dtype=weights.dtype, device=weights.device)
    )
    return parts.sum(2)
