"""Gathered stacked weights -> one routed-experts node.

Batched dispatch gathers every branch's weight matrix from stacked parameters and multiplies batch
by batch: T * K copies of a matrix for a product that needs E of them.

    before:  h = bmm(W1[ids] [T*K, F, D], x[arange(T*K) // K].unsqueeze(-1)).squeeze(-1) + b1[ids]
             y = bmm(W2[ids] [T*K, D, F], act(h).unsqueeze(-1)).squeeze(-1) + b2[ids]
    after:   y = routed_experts(body, ids [T, K], (x,), (W1, b1, W2, b2)).reshape(T*K, D)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from ..graph.branches import Branches, NotOneExpert
from ..graph.dataflow import ancestors
from ..graph.lift_branches import Lifted, body_end, fold_branches, insert_routed, reshaped
from ..graph.one_expert import PRODUCTS, Leaves, OneExpert
from ..graph.region import NoMatch, module_path
from ..graph.routing_ids import (
    CASTS,
    FLAT_VIEWS,
    IdsProbe,
    branches_of,
    row_index,
)
from ..graph.row_rules import VIEWS, shape_of
from .base import PassReport


@dataclass(frozen=True)
class Gathered:
    """All values that depend on one choice of experts. parametric: see OneExpert."""

    branches: Branches
    experts: int
    parametric: dict[Node, Node | None]
    products: list[Node]


@dataclass(frozen=True)
class NormalizeGathered:
    """Replace products with weights gathered by routing ids, or say why not."""

    name: str = "normalize_gathered"

    def run(self, gm: GraphModule) -> PassReport:
        missed, changed = [], 0
        for group in find_gathered(gm, missed):
            # From the last product on, so that a layer's rows may come from another one's output.
            left = list(group.products)
            while left:
                last = left[-1]
                found = match_gathered(gm, group, last)
                if isinstance(found, NoMatch):
                    missed.append(found)
                    left = [p for p in left if p not in ancestors([last])]
                    continue
                left = [p for p in left if p not in found.products]
                replace_branches(gm, found)
                changed += 1
        if changed:
            gm.graph.eliminate_dead_code()
            gm.graph.lint()
            gm.recompile()
        return PassReport(self.name, changed, tuple(missed))


def find_gathered(gm: GraphModule, missed: list[NoMatch]) -> list[Gathered]:
    """Parameters gathered by the same ids and the products they take part in, last group first."""
    banks: dict[Branches, dict[Node, Node]] = {}
    refused: dict[Node, str] = {}
    for node in gm.graph.nodes:
        found = row_index(node)
        if found is None or not is_bank(found[0]):
            continue
        branches = branches_of(found[1])
        if isinstance(branches, Branches):
            banks.setdefault(branches, {})[node] = found[0]
        elif len(shape_of(found[0])) > 2:
            refused[node] = branches
    for gather, reason in refused.items():
        made = parametric_nodes(gm, {gather: gather})
        missed += [
            NoMatch("moe", module_path(n), f"an expert's weight is {reason}", gather)
            for n in gm.graph.nodes
            if n.target in PRODUCTS and any(a in made for a in n.all_input_nodes)
        ]
    groups = []
    for branches, gathers in banks.items():
        parametric = parametric_nodes(gm, gathers)
        products = [
            n
            for n in gm.graph.nodes
            if n.target in PRODUCTS
            and n not in parametric
            and any(a in parametric for a in n.all_input_nodes)
        ]
        experts = {shape_of(bank)[0] for bank in gathers.values()}
        if products:
            groups.append(Gathered(branches, min(experts), parametric, products))
    position = {n: i for i, n in enumerate(gm.graph.nodes)}
    return sorted(groups, key=lambda g: -position[g.products[-1]])


def is_bank(node: Node) -> bool:
    """A parameter as given: a placeholder [E, ...] behind views and casts at most."""
    while node.target in VIEWS | FLAT_VIEWS | CASTS:
        node = node.args[0]  # type: ignore[assignment]
    return node.op in ("placeholder", "get_attr") and len(shape_of(node)) > 1


def parametric_nodes(gm: GraphModule, gathers: dict[Node, Node]) -> dict[Node, Node | None]:
    """Nodes that depend on gathered parameters only -> the bank, None if computed further."""
    found: dict[Node, Node | None] = {}
    for node in gm.graph.nodes:
        if node in gathers:
            found[node] = gathers[node]
        elif node.op == "call_function" and node.all_input_nodes:
            found |= {node: None} if all(n in found for n in node.all_input_nodes) else {}
    return found


def below(gm: GraphModule, seeds: Iterable[Node], branches: Branches) -> set[Node]:
    """The seeds and the branch values that depend on one of them through branch values."""
    inside = set(seeds)
    for node in gm.graph.nodes:
        if any(n in inside for n in node.all_input_nodes):
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or branches.layout(shape_of(node)) is not None:
                inside.add(node)
    return inside


def match_gathered(gm: GraphModule, group: Gathered, product: Node) -> Lifted | NoMatch:
    """The experts whose last product is `product`; the graph is not changed."""
    branches, parametric = group.branches, group.parametric
    probe = IdsProbe(branches, group.experts)
    inside = below(gm, parametric, branches)

    def make_puller(leaves: Leaves) -> OneExpert:
        return OneExpert(branches, probe, leaves, parametric, inside)

    try:
        root = body_end(product, branches, make_puller)
        return fold_branches(root, branches, make_puller, parametric)
    except NotOneExpert as error:
        return NoMatch("moe", module_path(product), error.reason, error.node)


def replace_branches(gm: GraphModule, lifted: Lifted) -> None:
    """Put the routed node in the place of the branch output."""
    routed = insert_routed(gm, lifted, lifted.root)
    with gm.graph.inserting_before(lifted.root):
        out = reshaped(gm, routed, shape_of(lifted.root))
    lifted.root.replace_all_uses_with(out)


__all__ = ["NormalizeGathered", "below", "is_bank", "parametric_nodes"]
