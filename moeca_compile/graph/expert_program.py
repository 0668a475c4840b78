"""One expert's body as text, so that one op can run the experts one after another.

On a CPU what an expert makes of its rows then stays in the processor's cache. As ops on the rows of
all experts it goes to memory and back; 32 MiB and more are even mapped and cleared anew each time.

    gate, up = chunk(linear(x, W), 2, -1);  linear(silu(gate) * up, V)
    ->  [["linear.default", ["%0", "%1"], {}], ["chunk.default", ["%3", 2, -1], {}], ...]
"""

from __future__ import annotations

import json
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..lowering.expert_programs import GETITEM
from ..torch_compat import leaves
from .index_rules import SPLITS
from .row_rules import pointwise, rule_for
from .rule_base import argument

aten = torch.ops.aten
PRODUCTS = {aten.linear.default, aten.matmul.default, aten.mm.default}
TURNS = {aten.t.default, aten.transpose.int}


def expert_program(body: GraphModule, row_inputs: int) -> str | None:
    """The program of a body whose first `row_inputs` inputs are rows [T, D]; None if it has none.

    Made of products with parameters, ops on single elements, and splits of the last dim.
    """
    nodes = list(body.graph.nodes)
    holes = [n for n in nodes if n.op == "placeholder"]
    names = {hole: f"%{i}" for i, hole in enumerate(holes)}
    rows = set(holes[:row_inputs])
    lines: list[Any] = []
    for node in nodes[len(holes) : -1]:
        if node.op != "call_function" or not _keeps_rows(node, rows):
            return None
        args = [names[a] if isinstance(a, Node) else a for a in node.args]
        if not _is_text((args, node.kwargs)):
            return None
        if rows & set(node.all_input_nodes):
            rows.add(node)
        name = GETITEM if node.target is getitem else str(node.target).removeprefix("aten.")
        lines.append([name, args, node.kwargs])
        names[node] = f"%{len(names)}"
    (result,) = nodes[-1].args[0]
    ends_well = result is nodes[-2] and result in rows and _same_kind(result, holes[0])
    return json.dumps(lines) if lines and ends_well else None


def _keeps_rows(node: Node, rows: set[Node]) -> bool:
    """Whether row r of the result is made of row r of the operands alone, all rows [T, *]."""
    mine = [n for n in node.all_input_nodes if n in rows]
    others = [n for n in node.all_input_nodes if n not in rows]
    if not mine:
        return node.target in TURNS
    if node.target is getitem:
        return True
    if any(_dims(n) != 2 for n in mine):
        return False
    if node.target in PRODUCTS:
        return mine == [node.args[0]] and _dims(node.args[1]) == 2
    if node.target in SPLITS:
        return argument(node, 2, "dim", 0) in (-1, 1)
    return rule_for(node.target) is pointwise and all(_dims(n) <= 1 for n in others)


def _dims(node: Any) -> int:
    value = node.meta["val"]
    return value.dim() if isinstance(value, Tensor) else 0


def _is_text(tree: Any) -> bool:
    """Whether all constants can be written and read back; other nodes than arguments cannot."""
    kinds = (bool, int, float, str, type(None))
    return all(isinstance(leaf, kinds) for leaf in leaves(tree)[0])


def _same_kind(result: Node, rows: Node) -> bool:
    made, given = result.meta["val"], rows.meta["val"]
    return _dims(result) == 2 and made.dtype == given.dtype
