"""The experts behind rows that they picked, folded to one body, and the order of their places.

    pieces = picked.unbind(1) / picked.split(..)          one piece an expert
    out = stack([e(p) for e, p in zip(experts, pieces)])  listed: E subgraphs, one graph
    out = grouped_mm(act(grouped_mm(picked, W1, ends)), W2, ends)      grouped: stacked weights

The body is made on rows [T, Din]: a branch's output then depends on its token's row alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .body_graph import copied, evaluated, finish, rows_hole
from .choice_dispatch import Dispatch, NotChoice
from .choice_probe import concrete
from .dataflow import ancestors, descendants
from .expert_columns import NotIsomorphic, align_experts, is_parameter, stack_of
from .index_rules import JOINS, PARTS, SPLITS
from .routing_ids import CASTS, FLAT_VIEWS
from .row_rules import item_of_tuple, pointwise, rule_for, shape_of
from .rule_base import argument
from .view_rules import PERMUTES, VIEWS, transposed_of

aten = torch.ops.aten
STACKS = {aten.stack.default}
PICKS = {aten.select.int}


@dataclass(frozen=True)
class ChosenBody:
    """One expert as a graph of rows [T, Din] and parameters.

    out: its output for all places [.., D]; source: the picked rows as the experts got them;
    params: one entry a body parameter, a stacked node or a node an expert; expert [R]: of each
    place of `out`; order [R]: its number among the places of the picked rows; shape: of `out`,
    where the graph knows it at run time only.
    """

    out: Node
    shape: tuple[int, ...]
    source: Node
    body: GraphModule
    params: tuple[Any, ...]
    experts: int
    expert: Tensor
    order: Tensor


def find_body(dispatch: Dispatch) -> ChosenBody:
    """The experts that take the picked rows. Raises NotChoice."""
    below = descendants(dispatch.picked)
    nodes = [n for n in dispatch.picked.graph.nodes if n in below]
    if grouped := _grouped_products(dispatch.picked):
        return _grouped_body(dispatch, grouped)
    reason: NotChoice | None = None
    for node in nodes:
        if node.target in JOINS | STACKS and len(_joined(node)) > 1:
            try:
                return _listed_body(dispatch, node, below)
            except NotIsomorphic as error:
                reason = reason or NotChoice(error.reason, error.node)
            except NotChoice as error:
                reason = reason or error
    raise reason or NotChoice("no experts that take the picked rows one after another", nodes[0])


def _joined(node: Node) -> list[Node]:
    sources: Any = node.args[0]
    return list(sources)


# -- listed ------------------------------------------------------------------------------------


def _listed_body(dispatch: Dispatch, join: Node, below: set[Node]) -> ChosenBody:
    outs = _joined(join)
    pieces: list[Node] = []

    def are_rows(nodes: list[Node]) -> bool:
        source = _parts_of_one(nodes)
        if source is None or source not in below:
            return False
        if pieces and nodes != pieces:
            raise NotIsomorphic("experts read several parts of the picked rows", nodes[0])
        pieces[:] = nodes
        return True

    columns = align_experts(outs, are_rows)
    if not pieces:
        raise NotChoice("experts that do not read their own part of the picked rows", join)
    source = _parts_of_one(pieces)
    assert source is not None
    expert, order = _places_of(dispatch, source, pieces, join)
    body, params = first_expert(dispatch.tokens, outs[0], pieces[0], columns)
    shape = (*order.shape[:-1], int(outs[0].meta["val"].shape[-1]))
    flat = (expert.reshape(-1).long(), order.reshape(-1).long())
    return ChosenBody(join, shape, source, body, params, len(outs), *flat)


def _parts_of_one(nodes: list[Node]) -> Node | None:
    """What the nodes are the parts 0, 1, .. of: of a split, unbind or select."""
    first: Any = nodes[0]
    named = getattr(first.target, "__name__", "") == "getitem"
    if not named and first.target not in PICKS:
        return None
    at = 1 if named else 2
    for number, node in enumerate(nodes):
        same = node.target is first.target and node.args[0] is first.args[0]
        if not same or node.args[at] != number or node.args[1:at] != first.args[1:at]:
            return None
    producer: Any = first.args[0]
    if not named:
        return producer
    return producer.args[0] if producer.target in SPLITS | {aten.unbind.int} else None


def _places_of(
    dispatch: Dispatch, source: Node, pieces: list[Node], join: Node
) -> tuple[Tensor, Tensor]:
    """(expert, order) of the join's places [.., 1], read off numbered rows that take its way."""
    shape = shape_of(dispatch.picked)
    numbers = torch.arange(dispatch.places, dtype=torch.int32).reshape(*shape[:-1], 1)
    columns = torch.arange(shape[-1], dtype=torch.int32)
    at = _follow(dispatch.picked, source, numbers.expand(shape))
    if not torch.equal(
        _follow(dispatch.picked, source, columns.expand(shape)), columns.expand_as(at)
    ):
        raise NotChoice("the features of picked rows change places", source)
    if at.shape[-1] != shape[-1] or not torch.equal(at, at[..., :1].expand_as(at)):
        raise NotChoice("the picked rows are cut", source)
    parts = [concrete(p, {source: at[..., :1]}) for p in pieces]
    if any(p is None for p in parts):
        raise NotChoice("parts of a size that is known at run time only", pieces[0])
    outs = _joined(join)
    lead = [list(p.shape[:-1]) for p in parts]
    if any(outs[i].meta["val"].dim() != len(lead[i]) + 1 for i in range(len(outs))):
        raise NotChoice("an expert changes the shape of its rows", outs[0])
    owners = [torch.full_like(p, number) for number, p in enumerate(parts)]
    order = join.target(parts, *join.args[1:], **join.kwargs)  # type: ignore[operator]
    expert = join.target(owners, *join.args[1:], **join.kwargs)  # type: ignore[operator]
    if expert.numel() != dispatch.places or order.shape[-1] != 1:
        raise NotChoice("the experts' outputs are joined along their features", join)
    return expert, order


def _follow(start: Node, end: Node, value: Tensor) -> Tensor:
    """The value of `end` if `start` had this one; only views and casts may lie between."""
    path: list[Node] = []
    node: Any = end
    while node is not start:
        if node.target not in FLAT_VIEWS | PERMUTES | CASTS and not _keeps_all(node):
            raise NotChoice("the picked rows are changed before the experts get them", node)
        path.append(node)
        node = node.args[0]
    for node in reversed(path):
        if node.target not in CASTS and not _keeps_all(node):
            value = node.target(value, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return value


def _keeps_all(node: Node) -> bool:
    """Whether a part of rows is all of them."""
    return node.target in PARTS and shape_of(node) == shape_of(node.args[0])


def first_expert(
    tokens: int, out: Node, piece: Node, columns: dict[Node, list[Node]]
) -> tuple[GraphModule, tuple[Any, ...]]:
    """(body on `tokens` rows, its parameters) from expert 0's output and the rows it is called on.

    columns: aligned nodes of all experts. Raises NotChoice.
    """
    graph = Graph()
    values = {piece: rows_hole(graph, tokens, piece)}
    order = [n for n in out.graph.nodes if n in columns]
    leaves = [n for n in order if n is not piece and is_parameter(n, columns[n])]
    for number, leaf in enumerate(leaves):
        values[leaf] = graph.placeholder(f"param_{number}")
        values[leaf].meta = {"val": leaf.meta["val"]}
    for node in order:
        if node not in values:
            values[node] = copied(graph, node, values)
    finish(graph, values[out], tokens, out)
    params = tuple(stack_of(columns[leaf]) or tuple(columns[leaf]) for leaf in leaves)
    if not params:
        raise NotChoice("the experts read no parameters", out)
    return GraphModule(torch.nn.Module(), graph), params


# -- grouped -----------------------------------------------------------------------------------


def _grouped_products(picked: Node) -> list[Node]:
    """Grouped products behind the picked rows and what works on single rows, in graph order."""
    found: set[Node] = set()
    pending, seen = [picked], {picked}
    while pending:
        for user in pending.pop().users:
            grouped = user.target is aten._grouped_mm.default
            if user in seen or not (
                grouped
                or user.target in VIEWS | SPLITS
                or rule_for(user.target) in (pointwise, item_of_tuple)
            ):
                continue
            seen.add(user)
            pending.append(user)
            found |= {user} if grouped else set()
    return [n for n in picked.graph.nodes if n in found]


def _grouped_body(dispatch: Dispatch, products: list[Node]) -> ChosenBody:
    """grouped_mm(rows [R, I], W [E, I, O], ends) and what lies between, with W as a parameter."""
    last, source = products[-1], products[0].args[0]
    experts = shape_of(last.args[1])[0]
    inside = descendants(source) & ancestors([last])  # type: ignore[arg-type]
    ends = _equal_ends(products, experts, dispatch.places)
    graph = Graph()
    values: dict[Node, Node] = {source: rows_hole(graph, dispatch.tokens, source)}  # type: ignore[dict-item,arg-type]
    params: list[Node] = []
    for product in products:
        weight: Any = product.args[1]
        bank = transposed_of(weight) or weight
        if bank not in values:
            values[bank] = graph.placeholder(f"param_{len(params)}")
            values[bank].meta = {"val": bank.meta["val"][0]}
            params.append(bank)
    for node in last.graph.nodes:
        if node in inside and node is not source:
            values[node] = _grouped_node(graph, node, values, inside)
    finish(graph, values[last], dispatch.tokens, last)
    whole = torch.arange(dispatch.places, dtype=torch.int32)
    at = _follow(dispatch.picked, source, whole.unsqueeze(1).expand(-1, shape_of(source)[-1]))  # type: ignore[arg-type]
    if not torch.equal(at[:, 0], whole):
        raise NotChoice("the picked rows change places", last)
    body = GraphModule(torch.nn.Module(), graph)
    expert = torch.searchsorted(ends, whole.long(), right=True)
    shape = tuple(shape_of(last))
    return ChosenBody(last, shape, source, body, tuple(params), experts, expert, whole.long())  # type: ignore[arg-type]


def _equal_ends(products: list[Node], experts: int, places: int) -> Tensor:
    expected = (torch.arange(experts) + 1) * (places // experts)
    for product in products:
        offsets = argument(product, 2, "offs")
        found = concrete(offsets, {}) if isinstance(offsets, Node) else None
        if found is None or not torch.equal(found.long(), expected):
            raise NotChoice("a grouped product of other than equal groups", product)
        if argument(product, 3, "bias") is not None or len(shape_of(product.args[0])) != 2:
            raise NotChoice("a grouped product with a bias, or not of [R, I] rows", product)
    return expected


def _grouped_node(graph: Graph, node: Node, values: dict[Node, Node], inside: set[Node]) -> Node:
    if node.target is not aten._grouped_mm.default:
        foreign = [n for n in node.all_input_nodes if n not in inside]
        if foreign:
            raise NotChoice("experts that read more than the picked rows", foreign[0])
        return copied(graph, node, values)
    args: Any = node.args
    rows, weight = args[:2]
    bank = transposed_of(weight)
    target = aten.linear.default if bank else aten.matmul.default
    product = graph.call_function(target, (values[rows], values[bank or weight]))
    return evaluated(product, node)
