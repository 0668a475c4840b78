"""Dump text of one node and of a diff: everything that is known about a node is in its line."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, symbolic_trace

from moeca_compile.debug.graph_diff import graph_diff
from moeca_compile.debug.graph_text import graph_text, node_code


def graph() -> GraphModule:
    def run(x: Tensor) -> Tensor:
        values, _ = torch.ops.aten.topk.default(x.reshape(-1, 4), 2)
        return torch.ops.aten.cat.default([values, values], -1)

    return symbolic_trace(run)


def test_a_line_has_type_call_module_and_source() -> None:
    gm = graph()
    topk = next(n for n in gm.graph.nodes if n.name == "topk_default")
    topk.meta["val"] = (torch.empty(3, 2), torch.empty(3, 2, dtype=torch.int64))
    topk.meta["nn_module_stack"] = {"k": ("L['self']._modules['blocks']._modules['0']", "Block")}
    topk.meta["stack_trace"] = 'File "/somewhere/model.py", line 7, in forward\n  topk(x)'
    text = graph_text(gm, {topk: "blocks.0 router"})
    (line,) = [each for each in text.splitlines() if each.startswith("topk_default")]
    code, comment = line.split("#")
    assert code.rstrip() == (
        'topk_default: "(f32[3, 2], i64[3, 2])" = torch.ops.aten.topk.default(reshape, 2)'
    )
    assert comment.split() == ["blocks.0", "model.py:7", "[blocks.0", "router]"]
    assert text.startswith("# model.py is /somewhere/model.py\n")


def test_methods_items_and_lists_read_as_python() -> None:
    code = [node_code(n) for n in graph().graph.nodes]
    assert "reshape = x.reshape(-1, 4)" in code
    assert "getitem = topk_default[0]" in code
    assert "cat_default = torch.ops.aten.cat.default([getitem, getitem], -1)" in code
    assert code[-1] == "return cat_default"


def test_a_diff_shows_what_changed_and_says_when_nothing_is_alike() -> None:
    before = "\n".join(f"node_{i} = f({i})" for i in range(20))
    after = before.replace("node_7 = f(7)", "node_7 = g(7)")
    changed = [
        line
        for line in graph_diff(before, after, ("aten", "normal")).splitlines()
        if line[0] in "+-" and line[:3] not in ("+++", "---")
    ]
    assert changed == ["-node_7 = f(7)", "+node_7 = g(7)"]
    assert "left the graph as aten" in graph_diff(before, before, ("aten", "normal"))
    assert "another dialect" in graph_diff(before, before.replace("f", "h"), ("aten", "normal"))
