"""Experts that pick tokens from the whole batch, as many as the data says -> one chosen node.

How many tokens an expert takes is known at run time only, so every token has a place at every
expert, and a mask says which are taken. Experts run on the taken ones only.

    before:  gate, index = topk(scores_e [T], count_e);  y[index] += gate[:, None] * e(x[index])
    after:   valid [T, E] = rank of the score among the tokens < count_e
             out = chosen_experts(body, arange(T * E), (x,), params, groups, valid)    [T * E, D]
             y + (out.reshape(T, E, D) * gates[.., None]).sum(1)

Of tokens with exactly equal scores at the edge another one may be taken than `topk` takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..graph.branch_order import ZEROS
from ..graph.choice_body import first_expert
from ..graph.choice_dispatch import NotChoice
from ..graph.chosen import chosen_experts
from ..graph.dataflow import ancestors
from ..graph.expert_columns import NotIsomorphic, align_experts
from ..graph.lift_branches import inline, trace_part
from ..graph.pool_links import Link, find_chains
from ..graph.region import NoMatch, module_path
from ..graph.routing_ids import CASTS, row_index
from ..graph.row_rules import Stop, shape_of
from ..graph.sizes import erase_sizes
from ..graph.view_rules import VIEWS
from .base import PassReport
from .combine_ops import PRODUCTS

aten = torch.ops.aten
SCALES = CASTS | VIEWS | {aten.mul.Scalar, aten.mul.Tensor, aten.div.Tensor, aten.div.Scalar}


@dataclass(frozen=True)
class PoolMatch:
    """rows: [T, D], what all experts pick from; gate: of each link, the node multiplied with its
    expert's output; value: of the node to be."""

    chain: list[Link]
    rows: Node
    gate: list[Node]
    body: GraphModule
    params: tuple[Any, ...]
    value: Tensor


@dataclass(frozen=True)
class NormalizePool:
    """Replace chains of experts that pick their tokens one after another, or say why not."""

    name: str = "normalize_pool"

    def run(self, gm: GraphModule) -> PassReport:
        missed, changed = [], 0
        for chain in find_chains(gm):
            try:
                replace_chain(gm, match_chain(chain), changed)
                changed += 1
            except (NotChoice, NotIsomorphic) as error:
                missed.append(_missed(chain, error.reason, error.node))
            except Stop as stop:
                missed.append(_missed(chain, stop.reason, chain[-1].node))
        if changed:
            gm.graph.eliminate_dead_code()
            erase_sizes(gm)
            gm.graph.eliminate_dead_code()
            gm.graph.lint()
            gm.recompile()
        return PassReport(self.name, changed, tuple(missed))


def _missed(chain: list[Link], reason: str, node: Node) -> NoMatch:
    tokens = chain[0].top.of
    text = f"expert choice among all {tokens} rows: {reason}; computed as written"
    return NoMatch("moe", module_path(chain[0].node), text, node)


def match_chain(chain: list[Link]) -> PoolMatch:
    """The graph is not changed. Raises NotChoice, NotIsomorphic or Stop."""
    for link in chain:
        if link.top.of != shape_of(link.before)[0] or link.top.node.args[3:4] == (False,):
            raise NotChoice(
                "picks among other rows than it adds to, or the smallest", link.top.node
            )
    products = [_product(link) for link in chain]
    sides = [_sides(link, p) for link, p in zip(chain, products, strict=True)]
    gates, outs = [s[0] for s in sides], [s[1] for s in sides]
    pieces: list[Node] = []

    def are_rows(nodes: list[Node]) -> bool:
        found = [row_index(n) for n in nodes]
        picks = [link.top.picks for link in chain]
        if any(f is None or f[1] is not p for f, p in zip(found, picks)):
            return False
        if any(f[0] is not found[0][0] for f in found):  # type: ignore[index]
            raise NotIsomorphic("experts pick from different rows", nodes[0])
        pieces[:] = nodes
        return True

    columns = align_experts(outs, are_rows)
    if not pieces:
        raise NotChoice("experts that do not read the rows they picked", outs[0])
    rows: Node = row_index(pieces[0])[0]  # type: ignore[index]
    tokens, experts = chain[0].top.of, len(chain)
    if len(shape_of(rows)) != 2 or shape_of(rows)[0] != tokens:
        raise NotChoice("rows are picked from other than [T, D]", pieces[0])
    body, params = first_expert(tokens, outs[0], pieces[0], columns)
    value = rows.meta["val"]
    with value.fake_mode, torch.no_grad():
        places = torch.empty(tokens * experts, dtype=torch.int64, device=value.device)
        everywhere = torch.ones_like(places, dtype=torch.bool)
        fakes = torch.fx.map_arg(params, lambda n: n.meta["val"])
        out = chosen_experts(body, places, [value], fakes, (1, len(places)), everywhere)
    return PoolMatch(chain, rows, gates, body, params, out)


def _product(link: Link) -> Node:
    node: Any = link.added
    while node.target in CASTS:
        node = node.args[0]
    if node.target not in PRODUCTS:
        raise NotChoice("what an expert adds is not its output times a gate", node)
    return node


def _sides(link: Link, product: Node) -> tuple[Node, Node]:
    """(gate, expert's output) of the product."""
    root = link.gates
    for gate, out in (product.args[:2], product.args[1::-1]):
        if root is None or not isinstance(gate, Node) or not isinstance(out, Node):
            continue
        if _gate_path(gate, root) is not None and root not in ancestors([out]):
            return gate, out
    raise NotChoice("what an expert adds is not its output times its picked score", product)


def _gate_path(gate: Node, root: Node) -> list[Node] | None:
    """Nodes from the picked scores, exclusive, to the gate; None unless it only scales them."""
    path: list[Node] = []
    while gate is not root:
        if gate.target not in SCALES or len(gate.all_input_nodes) != 1:
            return None
        path.insert(0, gate)
        gate = gate.all_input_nodes[0]
    return path


def replace_chain(gm: GraphModule, match: PoolMatch, number: int) -> Node:
    """Put the node and the sum over experts in the place of the last link. Returns the node."""
    chain, graph, last = match.chain, gm.graph, match.chain[-1].node
    tokens, experts = chain[0].top.of, len(chain)
    mode = match.value.fake_mode  # type: ignore[attr-defined]
    paths = [_gate_path(g, link.gates) for g, link in zip(match.gate, chain, strict=True)]  # type: ignore[arg-type]
    scores = [link.scores for link in chain]
    counts = [_count(link) for link in chain]
    given = [c for c in counts if isinstance(c, Node)]

    def mask(*values: Tensor) -> tuple[Tensor, Tensor]:
        table, sizes = torch.stack(values[:experts], 1), list(values[experts:])
        wanted = [sizes.pop(0) if isinstance(c, Node) else torch.full((), c) for c in counts]  # type: ignore[arg-type]
        valid = ranks(table) < torch.stack([w.reshape(()) for w in wanted]).unsqueeze(0)
        return torch.arange(tokens * experts, device=table.device), valid.reshape(-1)

    def gates(*values: Tensor) -> tuple[Tensor]:
        each = [_scaled(v, p or []) for v, p in zip(values, paths, strict=True)]
        return (torch.stack([g.reshape(tokens) for g in each], 1),)

    base, dtype = chain[0].before, last.meta["val"].dtype
    added = [] if base.target in ZEROS else [base]

    def combine(out: Tensor, weights: Tensor, *first: Tensor) -> tuple[Tensor]:
        rows = out.reshape(tokens, experts, -1) * weights.unsqueeze(-1)
        total = rows.to(dtype).sum(1)
        return (first[0] + total if first else total,)

    setattr(gm, name := f"pool_body_{number}", match.body)
    fakes = [s.meta["val"] for s in scores]
    sizes = [n.meta["val"] for n in given]
    with graph.inserting_before(last):
        places, valid = inline(gm, trace_part(mask, [*fakes, *sizes], mode), [*scores, *given])
        (weights,) = inline(gm, trace_part(gates, fakes, mode), scores)
        handle = graph.get_attr(name)
        args: Any = (handle, places, (match.rows,), match.params, (1, tokens * experts), valid)
        chosen = graph.call_function(chosen_experts, args)
        chosen.meta = {**match.gate[0].meta, "val": match.value}
        holes = [n.meta["val"] for n in (chosen, weights, *added)]
        (out,) = inline(gm, trace_part(combine, holes, mode), [chosen, weights, *added])
    last.replace_all_uses_with(out)
    return chosen


def ranks(scores: Tensor) -> Tensor:
    """How many tokens of each column of `scores [T, E]` come before each: 0 for the largest."""
    order = torch.argsort(scores, dim=0, descending=True, stable=True)
    number = torch.arange(scores.shape[0], device=scores.device).unsqueeze(1)
    return torch.zeros_like(order).scatter(0, order, number.expand_as(order))


def _scaled(value: Tensor, path: list[Node]) -> Tensor:
    for node in path:
        args = torch.fx.map_arg(node.args, lambda n, value=value: value)
        value = node.target(*args, **node.kwargs)  # type: ignore[operator]
    return value


def _count(link: Link) -> Node | int:
    """The tensor that says how many tokens the expert picks, or the number."""
    count: Any = link.top.count
    if isinstance(count, Node):
        if count.target is not aten.item.default:
            raise NotChoice("a number of tokens that is computed on the host", count)
        return count.args[0]  # type: ignore[return-value]
    return count
