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

from ..graph.expert_columns import NotIsomorphic, align_experts, is_parameter, stack_of
from ..graph.experts import routed_experts
from ..graph.region import NoMatch, module_path
from ..graph.row_rules import Stop
from .base import PassReport


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
    columns = align_experts(outs, _marked_rows)
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


def _marked_rows(nodes: list[Node]) -> bool:
    """Whether these are the markers of each expert's rows. Raises NotIsomorphic."""
    if nodes[0].target is not torch.ops.moeca.expert_rows.default:
        return False
    for number, marker in enumerate(nodes):
        if marker.target is not nodes[0].target or marker.args[1] != number:
            raise NotIsomorphic(f"rows of expert {number} belong to another expert", marker)
        if marker.args[0] is not nodes[0].args[0]:
            raise NotIsomorphic("experts read different rows", marker)
    return True


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
    leaves = [n for n in order if n not in mapped and is_parameter(n, columns[n])]
    for i, leaf in enumerate(leaves):
        mapped[leaf] = graph.placeholder(f"param_{i}")
        mapped[leaf].meta = {"val": leaf.meta["val"]}
    for node in order:
        if node not in mapped:
            mapped[node] = graph.node_copy(node, lambda n: mapped[n])
    graph.output((mapped[out],))
    body = GraphModule(torch.nn.Module(), graph)
    params = [stack_of(columns[leaf]) or tuple(columns[leaf]) for leaf in leaves]
    return body, rows, params  # type: ignore[return-value]
