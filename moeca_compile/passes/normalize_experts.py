"""Captured dispatch -> one routed-experts node.

The captured form calls every expert on every row and selects. If the E expert subgraphs are the
same graph with other parameters, they become one body and the dense work disappears.

    before:  y_e = expert_e(moeca.expert_rows(x [T, D], e));  moeca.select_experts(ids, [y_0..])
    after:   routed_experts(body, ids [T, K], (x,), params)   -> [T, K, D]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node

from ..graph.experts import routed_experts
from ..graph.region import NoMatch, module_path
from ..graph.row_rules import Stop
from .base import PassReport


class NotIsomorphic(Exception):
    """Two experts are not the same graph; `node` is where they part."""

    def __init__(self, reason: str, node: Node):
        super().__init__(reason)
        self.node = node


@dataclass(frozen=True)
class NormalizeExperts:
    """Replace every `moeca.select_experts` by a `routed_experts` node, or say why not."""

    name: str = "normalize_experts"

    def run(self, gm: GraphModule) -> PassReport:
        missed, changed = [], 0
        for node in list(gm.graph.nodes):
            if node.target is not torch.ops.moeca.select_experts.default:
                continue
            try:
                lift_experts(gm, node, changed)
                changed += 1
            except NotIsomorphic as error:
                missed.append(NoMatch("moe", module_path(node), str(error), error.node))
            except Stop as stop:
                missed.append(NoMatch("moe", module_path(node), stop.reason, node))
        if changed:
            gm.graph.eliminate_dead_code()
            gm.graph.lint()
            gm.recompile()
        return PassReport(self.name, changed, tuple(missed))


def lift_experts(gm: GraphModule, select: Node, number: int) -> None:
    """Rewrite one select node. Raises NotIsomorphic or Stop, the graph then unchanged."""
    ids, outs = cast(Node, select.args[0]), list(cast(Sequence[Node], select.args[1]))
    columns = _align_experts(outs)
    body, rows, params = _build_body(outs[0], columns, len(outs))
    with select.meta["val"].fake_mode, torch.no_grad():
        fake = [r.meta["val"] for r in rows]
        leaves = torch.fx.map_arg(params, lambda node: node.meta["val"])
        value = routed_experts(body, ids.meta["val"], fake, leaves)
    name = f"expert_body_{number}"
    setattr(gm, name, body)
    with gm.graph.inserting_before(select):
        handle = gm.graph.get_attr(name)
        routed = gm.graph.call_function(routed_experts, (handle, ids, tuple(rows), tuple(params)))
    routed.meta = {**select.meta, "val": value}
    select.replace_all_uses_with(routed)
    gm.graph.erase_node(select)


def _align_experts(outs: list[Node]) -> dict[Node, list[Node]]:
    """Each node of expert 0 -> the corresponding node of every expert."""
    columns: dict[Node, list[Node]] = {}

    def visit(nodes: list[Node]) -> None:
        first = nodes[0]
        if first in columns:
            if columns[first] != nodes:
                raise NotIsomorphic("experts share values in different ways", nodes[0])
            return
        columns[first] = nodes
        if first.target is torch.ops.moeca.expert_rows.default:
            _check_markers(nodes)
            return
        if first.op in ("placeholder", "get_attr") or all(n is first for n in nodes):
            return
        if _stack_of(nodes) is not None:
            return
        for other in nodes[1:]:
            if other.op != first.op or other.target != first.target:
                raise NotIsomorphic(f"experts differ: {first.target} against {other.target}", other)
        compare([n.args for n in nodes], first)
        compare([n.kwargs for n in nodes], first)

    def compare(trees: list[Any], at: Node) -> None:
        first = trees[0]
        if isinstance(first, Node):
            if not all(isinstance(t, Node) for t in trees):
                raise NotIsomorphic("experts differ in an argument", at)
            visit(trees)
        elif isinstance(first, (tuple, list)):
            if any(len(t) != len(first) for t in trees):
                raise NotIsomorphic("experts differ in an argument list", at)
            for parts in zip(*trees, strict=True):
                compare(list(parts), at)
        elif isinstance(first, dict):
            compare([tuple(sorted(t.items())) for t in trees], at)
        elif any(t != first for t in trees):
            raise NotIsomorphic(f"experts differ in a constant: {first}", at)

    visit(outs)
    return columns


def _check_markers(nodes: list[Node]) -> None:
    for number, marker in enumerate(nodes):
        if marker.target is not nodes[0].target or marker.args[1] != number:
            raise NotIsomorphic(f"rows of expert {number} belong to another expert", marker)
        if marker.args[0] is not nodes[0].args[0]:
            raise NotIsomorphic("experts read different rows", marker)


def _build_body(
    out: Node, columns: dict[Node, list[Node]], experts: int
) -> tuple[GraphModule, list[Node], list[Any]]:
    """(body, row inputs, params): params[j] is body parameter j, E nodes or one stack [E, ...]."""
    graph = Graph()
    order = [n for n in out.graph.nodes if n in columns]
    markers = [n for n in order if n.target is torch.ops.moeca.expert_rows.default]
    rows = list(dict.fromkeys(m.args[0] for m in markers))
    mapped: dict[Node, Node] = {}
    for i, row in enumerate(rows):
        hole = graph.placeholder(f"rows_{i}")
        hole.meta = {"val": row.meta["val"]}  # type: ignore[union-attr]
        mapped.update({m: hole for m in markers if m.args[0] is row})
    leaves = [n for n in order if _is_leaf(n, columns[n])]
    for i, leaf in enumerate(leaves):
        mapped[leaf] = graph.placeholder(f"param_{i}")
        mapped[leaf].meta = {"val": leaf.meta["val"]}
    for node in order:
        if node not in mapped:
            mapped[node] = graph.node_copy(node, lambda n: mapped[n])
    graph.output((mapped[out],))
    body = GraphModule(torch.nn.Module(), graph)
    params = [_stack_of(columns[leaf]) or tuple(columns[leaf]) for leaf in leaves]
    return body, rows, params  # type: ignore[return-value]


def _is_leaf(node: Node, column: list[Node]) -> bool:
    if node.target is torch.ops.moeca.expert_rows.default:
        return False
    held = node.op in ("placeholder", "get_attr") or all(n is node for n in column)
    return held or _stack_of(column) is not None


def _stack_of(column: list[Node]) -> Node | None:
    """The one tensor [E, ...] of which column entry e is slice e, if there is one."""
    stack = column[0].args[0] if column[0].target is torch.ops.aten.select.int else None
    if not isinstance(stack, Node) or stack.op not in ("placeholder", "get_attr"):
        return None
    slices = all(
        node.target is torch.ops.aten.select.int and node.args == (stack, 0, number)
        for number, node in enumerate(column)
    )
    return stack if slices and stack.meta["val"].shape[0] == len(column) else None
