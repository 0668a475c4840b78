"""Expert choice -> one chosen-experts node.

Each expert's part of the picked rows goes through that expert, written in one way or another. If
the experts are one graph, what they compute is a list of branches, and only the list is needed.

    before:  picked = flat[rows [R]];  out = cat([e(p) for e, p in zip(experts, picked.split(C))])
    after:   places = rows * E + arange(R) // C % E
             out = chosen_experts(body, places [R], (flat [T, D],), params, groups)     [R, D]

What is done with `out`, gates included, stays as written.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..graph.choice_body import ChosenBody, find_body
from ..graph.choice_dispatch import Dispatch, NotChoice, Top, dispatch_of, find_dispatches, find_top
from ..graph.choice_probe import check_distinct, find_experts, find_groups, probe_numbers
from ..graph.chosen import Groups, chosen_experts
from ..graph.dataflow import descendants, is_heavy
from ..graph.lift_branches import inline, reshaped, trace_part
from ..graph.region import NoMatch, module_path
from ..graph.row_rules import Stop, shape_of
from ..graph.sizes import erase_sizes, fix_sizes
from .base import PassReport

aten = torch.ops.aten


@dataclass(frozen=True)
class ChoiceMatch:
    """The node to be. numbers: as of `Dispatch`; shape: of the picked rows' places; axes: their
    order in the experts' output; run: places in a row of one expert."""

    dispatch: Dispatch
    experts: ChosenBody
    groups: Groups
    axes: tuple[int, ...]
    run: int
    value: Tensor


@dataclass(frozen=True)
class NormalizeChoice:
    """Replace the experts of layers in which experts pick their tokens, or say why not."""

    name: str = "normalize_choice"

    def run(self, gm: GraphModule) -> PassReport:
        missed: dict[str, NoMatch] = {}
        changed = 0
        for node in list(gm.graph.nodes):
            if (top := find_top(node)) is None:
                continue
            for found in match_choice(top):
                if isinstance(found, NoMatch):
                    missed.setdefault(found.name, found)
                    continue
                replace_choice(gm, found, changed)
                changed += 1
        if changed:
            gm.graph.eliminate_dead_code()
            gm.graph.lint()
            gm.recompile()
        return PassReport(self.name, changed, tuple(missed.values()))


def match_choice(top: Top) -> list[ChoiceMatch | NoMatch]:
    """What the picks of one `topk` are used for; the graph is not changed."""
    found: list[ChoiceMatch | NoMatch] = []
    for node in find_dispatches(top):
        try:
            dispatches = [d for d in dispatch_of(top, node) if _feeds_products(d.picked)]
            if dispatches and not isinstance(top.count, int):
                raise NotChoice("how many is known at run time only", top.node)
            found += [_match(d) for d in dispatches]
        except NotChoice as error:
            found.append(_missed(top, error.reason, error.node))
        except Stop as stop:
            found.append(_missed(top, stop.reason, node))
    return found


def _missed(top: Top, reason: str, node: Node) -> NoMatch:
    picked = "expert choice"
    if isinstance(top.count, int):
        picked += f", each expert picks {top.count} of {top.of} tokens"
    return NoMatch("moe", module_path(top.node), f"{picked}: {reason}; computed as written", node)


def _match(dispatch: Dispatch) -> ChoiceMatch:
    top, experts = dispatch.top, find_body(dispatch)
    numbers = [n.index_select(0, experts.order) for n in probe_numbers(dispatch)]
    run = find_experts(experts.expert, experts.experts, experts.out)
    check_distinct(numbers, experts.expert, dispatch.tokens, dispatch.picked)
    groups = find_groups(numbers, dispatch.tokens, top.of, dispatch.picked)
    axes = _axes(shape_of(dispatch.picked)[:-1], experts.order, experts.out)
    out = experts.out.meta["val"]
    with out.fake_mode, torch.no_grad():
        places = torch.empty(dispatch.places, dtype=torch.int64, device=out.device)
        hole = next(n for n in experts.body.graph.nodes if n.op == "placeholder")
        params = torch.fx.map_arg(experts.params, lambda n: n.meta["val"])
        value = chosen_experts(
            experts.body, places, [hole.meta["val"]], params, (groups.count, groups.run)
        )
    if value.numel() != prod(experts.shape) or value.dtype != out.dtype:
        raise NotChoice("the experts' outputs have another form than one row a place", experts.out)
    return ChoiceMatch(dispatch, experts, groups, axes, run, value)


def _axes(shape: list[int], order: Tensor, at: Node) -> tuple[int, ...]:
    """The permutation of the places' dims that gives `order`. Raises NotChoice."""
    numbers = torch.arange(order.numel()).reshape(shape)
    for axes in permutations(range(len(shape))):
        if torch.equal(numbers.permute(axes).reshape(-1), order):
            return axes
    raise NotChoice("the places of the picked rows are mixed", at)


def replace_choice(gm: GraphModule, match: ChoiceMatch, number: int) -> Node:
    """Put the node in the place of the experts' output. Returns it."""
    dispatch, experts, graph = match.dispatch, match.experts, gm.graph
    out, index = experts.out, dispatch.index
    shape, count, run = shape_of(dispatch.picked)[:-1], experts.experts, match.run

    def numbered(value: Tensor) -> tuple[Tensor]:
        rows = dispatch.numbers(value).reshape(shape).permute(match.axes).reshape(-1)
        expert = torch.arange(rows.numel(), device=rows.device) // run % count
        return (rows * count + expert,)

    part = trace_part(numbered, [index.meta["val"]], out.meta["val"].fake_mode)
    name = f"chosen_body_{number}"
    setattr(gm, name, experts.body)
    width = shape_of(dispatch.rows)[-1]
    with graph.inserting_before(out):
        (places,) = inline(gm, part, [index])
        rows = reshaped(gm, dispatch.rows, [dispatch.tokens, width])
        rows = _cast(gm, rows, experts.source.meta["val"].dtype)
        handle = graph.get_attr(name)
        groups = (match.groups.count, match.groups.run)
        args: Any = (handle, places, (rows,), experts.params, groups)
        chosen = graph.call_function(chosen_experts, args)
        chosen.meta = {**out.meta, "val": match.value}
        whole = reshaped(gm, chosen, list(experts.shape))
    out.replace_all_uses_with(whole)
    graph.erase_node(out)
    fix_sizes(gm)
    erase_sizes(gm)
    return chosen


def _cast(gm: GraphModule, node: Node, dtype: torch.dtype) -> Node:
    value = node.meta["val"]
    if value.dtype == dtype:
        return node
    cast = gm.graph.call_function(aten.to.dtype, (node, dtype))
    with value.fake_mode, torch.no_grad():
        cast.meta = {**node.meta, "val": value.to(dtype)}
    return cast


def _feeds_products(picked: Node) -> bool:
    """Whether rows of activations are picked for matrix products: experts, not sorting or gates."""
    return any(is_heavy(n) or n.target is aten._grouped_mm.default for n in descendants(picked))
