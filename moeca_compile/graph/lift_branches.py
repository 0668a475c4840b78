"""From a matched branch computation to a routed-experts node.

    before:  root [T*K, D], computed for each branch with its expert's parameters
    after:   routed_experts(body, ids [T, K], rows ([T, D],), params ([E, ...],))   [T, K, D]

Building is separate from editing: `fold_branches` makes the body, stacks parameters and dry-runs
the node under the graph's fake mode; `insert_routed` only adds nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from .branches import Branches, NotOneExpert
from .dataflow import ancestors
from .experts import num_experts_of, routed_experts
from .layout import Layout
from .one_expert import (
    Leaves,
    OneExpert,
    StackedParameter,
    fake_hole,
    one_expert_shape,
)
from .row_rules import Stop, shape_of

aten = torch.ops.aten
MakePuller = Callable[[Leaves], OneExpert]


@dataclass(frozen=True)
class Lifted:
    """A routed node to be. params: what each body parameter is computed from, in body order.

    stack: graph from `banks` to the stacked parameters that are not simply a bank; products: the
    matrix products it replaces.
    """

    root: Node
    branches: Branches
    body: GraphModule
    rows: tuple[Node, ...]
    params: tuple[Node, ...]
    shared: tuple[Node, ...]
    parametric: dict[Node, Node | None]
    stack: GraphModule | None
    banks: tuple[Node, ...]
    value: Tensor
    products: frozenset[Node]

    @property
    def derived(self) -> list[Node]:
        return [p for p in self.params if self.parametric.get(p, p) is None]


def body_end(product: Node, branches: Branches, make_puller: MakePuller) -> Node:
    """The last node behind `product` that is still one expert's function of the same rows.

    Raises NotOneExpert if the product itself is none.
    """
    end = product
    rows = frozenset(_dry(product, branches, make_puller, None)[0].of("rows"))
    while len(end.users) == 1:
        (user,) = end.users
        if not isinstance(user.meta.get("val"), Tensor):
            break
        try:
            _dry(user, branches, make_puller, rows)
        except NotOneExpert:
            break
        end = user
    return end


def fold_branches(
    root: Node,
    branches: Branches,
    make_puller: MakePuller,
    parametric: dict[Node, Node | None],
) -> Lifted:
    """The routed node for the branch output `root`. Raises NotOneExpert; nothing is edited."""
    leaves, layout, puller = _dry(root, branches, make_puller, None)
    for leaf in [*leaves.of("rows"), *leaves.of("shared")]:
        if not puller.products.isdisjoint(ancestors([leaf])):
            raise NotOneExpert("mixes the branches of a token", leaf)
    rows, params, shared = (tuple(leaves.of(kind)) for kind in ("rows", "param", "shared"))
    if not rows or not params:
        raise NotOneExpert("the experts read no token rows or no parameters", root)
    fake_mode = root.meta["val"].fake_mode
    order = [("rows", n) for n in rows] + [("param", n) for n in params]
    order += [("shared", n) for n in shared]

    def one_expert(*holes: Tensor) -> tuple[Tensor]:
        filled = Leaves(fake_hole, dict(zip(order, holes, strict=True)))
        return (make_puller(filled).root(root, layout),)

    body = trace_part(one_expert, [leaves.holes[key] for key in order], fake_mode)
    stack, banks, stacked = _stack_parameters(params, parametric, branches)
    experts = num_experts_of(stacked)
    if any(s.shape[0] != experts for s in stacked):
        raise NotOneExpert("parameters of different numbers of experts", root)
    everyone = [(n.meta["val"],) * experts for n in shared]
    value = _dry_routed(root, branches, body, rows, [*stacked, *everyone])
    return Lifted(
        root,
        branches,
        body,
        rows,
        params,
        shared,
        parametric,
        stack,
        banks,
        value,
        frozenset(puller.products),
    )


def insert_routed(gm: GraphModule, lifted: Lifted, before: Node) -> Node:
    """Add the node [T, K, D] and what it needs in front of `before`. Returns it."""
    branches, graph = lifted.branches, gm.graph
    name = next(n for i in range(len(graph.nodes)) if not hasattr(gm, n := f"expert_body_{i}"))
    setattr(gm, name, lifted.body)
    with graph.inserting_before(before):
        made = inline(gm, lifted.stack, lifted.banks) if lifted.stack else []
        derived = dict(zip(lifted.derived, made, strict=True))
        stacked = [derived.get(p) or lifted.parametric.get(p, p) for p in lifted.params]
        experts = num_experts_of(stacked)
        ids = reshaped(gm, branches.ids, [branches.tokens, branches.top_k])
        rows = [
            reshaped(gm, r, [branches.tokens, r.meta["val"].numel() // branches.tokens])
            for r in lifted.rows
        ]
        params = (*stacked, *((n,) * experts for n in lifted.shared))
        handle = graph.get_attr(name)
        routed = graph.call_function(routed_experts, (handle, ids, tuple(rows), params))
    routed.meta = {**lifted.root.meta, "val": lifted.value}
    return routed


def reshaped(gm: GraphModule, node: Node, shape: list[int]) -> Node:
    """The node, or a reshape of it at the insertion point if it has another shape."""
    if shape_of(node) == shape:
        return node
    new = gm.graph.call_function(aten.reshape.default, (node, shape))
    value = node.meta["val"]
    with value.fake_mode, torch.no_grad():
        new.meta = {**node.meta, "val": value.reshape(shape)}
    return new


def inline(gm: GraphModule, part: GraphModule, inputs: Sequence[Node]) -> list[Node]:
    """Copy a traced graph to the insertion point. Returns the nodes of its outputs."""
    holes = [n for n in part.graph.nodes if n.op == "placeholder"]
    copies = dict(zip(holes, inputs, strict=True))
    for node in part.graph.nodes:
        if node.op == "call_function":
            copies[node] = gm.graph.node_copy(node, copies.__getitem__)
    return [copies[n] for n in part.graph.output_node().args[0]]  # type: ignore[union-attr]


def trace_part(
    function: Callable[..., Any], inputs: Sequence[Tensor], fake_mode: Any
) -> GraphModule:
    """`function`, returning a tuple, on fake inputs as an ATen graph to be inlined or kept."""
    with torch.no_grad(), fake_mode, preserve_node_meta():
        traced = make_fx(function, pre_dispatch=True)(*inputs)
    _merge_reshapes(traced)
    traced.graph.eliminate_dead_code()
    traced.graph.lint()
    traced.recompile()
    return traced


def _merge_reshapes(gm: GraphModule) -> None:
    """Drop what is left of [.., D] -> [.., D, 1] -> [.., D] around products."""
    for node in gm.graph.nodes:
        if node.target is not aten.reshape.default:
            continue
        source = node.args[0]
        while source.target is aten.reshape.default:
            source = source.args[0]
        node.args = (source, node.args[1])
        if shape_of(source) == shape_of(node):
            node.replace_all_uses_with(source)


def _dry(
    node: Node, branches: Branches, make_puller: MakePuller, only_rows: frozenset[Node] | None
) -> tuple[Leaves, Layout, OneExpert]:
    layout = branches.layout(shape_of(node))
    if layout is None:
        raise NotOneExpert("its output has no branches [T, K] or [T * K] in front", node)
    leaves = Leaves(fake_hole, only_rows=only_rows)
    # Not under the fake mode: roles of index nodes are found by running them on real ids.
    with torch.no_grad():
        puller = make_puller(leaves)
        puller.root(node, layout)
    return leaves, layout, puller


def _dry_routed(
    root: Node, branches: Branches, body: GraphModule, rows: tuple[Node, ...], params: list[Any]
) -> Tensor:
    """The fake value [T, K, D] of the node to be, which proves that the body can be evaluated."""
    with root.meta["val"].fake_mode, torch.no_grad():
        ids = branches.ids.meta["val"].reshape(branches.tokens, branches.top_k)
        fakes = [r.meta["val"].reshape(branches.tokens, -1) for r in rows]
        try:
            return routed_experts(body, ids, fakes, params)
        except Stop as stop:
            raise NotOneExpert(stop.reason, root) from None


def _stack_parameters(
    params: tuple[Node, ...], parametric: dict[Node, Node | None], branches: Branches
) -> tuple[GraphModule | None, tuple[Node, ...], list[Tensor]]:
    """(graph computing the derived parameters, its inputs, fake value of each parameter)."""
    banks = {n: bank for n, bank in parametric.items() if bank is not None}
    derived = [p for p in params if parametric.get(p, p) is None]
    whole = {p: banks.get(p, p).meta["val"] for p in params if p not in derived}
    if not derived:
        return None, (), [whole[p] for p in params]
    sources = tuple(dict.fromkeys(banks.values()))
    experts = shape_of(sources[0])[0]

    def stacked(*values: Tensor) -> tuple[Tensor, ...]:
        of = dict(zip(sources, values, strict=True))
        puller = StackedParameter(branches, {n: of[b] for n, b in banks.items()}, experts)
        out = []
        for node in derived:
            layout = branches.layout(shape_of(node))
            if layout is None:
                raise NotOneExpert("a parameter without branches in front", node)
            inner = one_expert_shape(node, layout, parametric)
            out.append(puller.pull(node, layout).reshape([experts, *inner]))
        return tuple(out)

    fake_mode = derived[0].meta["val"].fake_mode
    part = trace_part(stacked, [s.meta["val"] for s in sources], fake_mode)
    made = [n.meta["val"] for n in part.graph.output_node().args[0]]  # type: ignore[union-attr]
    whole |= dict(zip(derived, made, strict=True))
    return part, sources, [whole[p] for p in params]
