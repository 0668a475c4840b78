"""Which node belongs to which matched region, and in which role.

layer_norm_1, mul, add     "blocks.0.moe attention"        rows of selected tokens only
softmax, topk              "blocks.0.moe router"           all rows, every step
routed_experts             "blocks.0.moe experts"          rows of selected branches only
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ..graph.dataflow import ancestors, descendants
from ..graph.region import AttentionRegion, MoERegion, NoMatch, Regions

moeca = torch.ops.moeca
CACHE_OPS = {
    moeca.cache_read.default: "read",
    moeca.cache_write.default: "write",
    moeca.cache_fill.default: "write",
    moeca.expert_thresholds.default: "guard",
    moeca.guard_branches.default: "guard",
    torch.ops.aten.index_copy_.default: "write",
    torch.ops.aten.copy_.default: "write",
    torch.ops.moeca.grouped_linear.default: "experts",
    torch.ops.moeca.grouped_experts.default: "experts",
}


@dataclass(frozen=True)
class Mark:
    """layer: the MoE layer's module path; role: what the node does for it."""

    layer: str
    role: str

    def __str__(self) -> str:
        return f"{self.layer} {self.role}".strip()


def region_marks(regions: Regions) -> dict[Node, Mark]:
    """Marks of the matched graph: router, experts, combine, shared, key_value, attention."""
    marks: dict[Node, Mark] = {}
    for moe in regions.moe:
        for role, nodes in _moe_roles(moe, regions.needed):
            for node in nodes:
                marks.setdefault(node, Mark(moe.name, role))
    return {node: mark for node, mark in marks.items() if node.op != "placeholder"}


def miss_marks(missed: Iterable[NoMatch]) -> dict[Node, Mark]:
    """The node at which each near miss stopped."""
    return {miss.node: Mark(miss.name, f"not matched: {miss.reason}") for miss in missed}


def variant_marks(gm: GraphModule) -> dict[Node, Mark]:
    """Reads, writes and decisions of a variant's graph."""
    return {n: Mark("", CACHE_OPS[n.target]) for n in gm.graph.nodes if n.target in CACHE_OPS}


def _moe_roles(moe: MoERegion, needed: frozenset[Node]) -> list[tuple[str, set[Node]]]:
    inputs = ancestors(moe.rows)
    router = ancestors([moe.ids, moe.weights], stop=set(moe.rows)) - inputs
    combine = ancestors([moe.combine], stop={moe.routed}) & descendants(moe.routed)
    shared = [ancestors([s.node]) - inputs - needed | {s.node} for s in moe.shared]
    roles = [
        ("experts", {moe.routed}),
        ("router", router & needed | {moe.ids, moe.weights}),
        ("combine", combine),
        ("shared expert", set[Node]().union(*shared)),
    ]
    for attention in moe.attention:
        roles += _attention_roles(attention, needed)
    return roles


def _attention_roles(
    attention: AttentionRegion, needed: frozenset[Node]
) -> list[tuple[str, set[Node]]]:
    inside = ancestors([attention.root.node]) - ancestors([attention.input.node]) - needed
    return [
        ("key_value", {root.node for root in attention.key_value}),
        ("attention", inside | {attention.root.node}),
    ]
