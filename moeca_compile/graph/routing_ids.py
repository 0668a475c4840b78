"""Routing ids, and integer index arithmetic that is a function of them.

Dispatch code sorts, counts and inverts ids in many spellings. What counts is the function, not the
spelling: index subgraphs depend on the ids (or on nothing) alone, so they are run on probe ids that
include the extremes (every branch to one expert, two experts, ascending, descending, uniform) and
the results are compared with what the rewrite assumes.

    offsets = cumsum(histc(ids.float()[perm], E, 0, E-1), int32)    i32[E]
    probe:    offsets == cumulative counts of ids, for every probe
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..torch_compat import map_leaves
from .branches import Branches
from .dataflow import ancestors
from .row_rules import pointwise, rule_for, shape_of
from .view_rules import RESHAPES, SQUEEZES

aten = torch.ops.aten
CASTS = {aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default}
# Changes of shape that keep the elements in row-major order.
FLAT_VIEWS = (
    RESHAPES
    | SQUEEZES
    | {
        aten.unsqueeze.default,
        aten.alias.default,
        aten.detach.default,
    }
)


def branches_of(index: Node) -> Branches | str:
    """The branches that an index lists in order, or why it is no list of routing ids."""
    if not is_integer(index):
        return f"indexed by {index.meta['val'].dtype}, not by integer routing ids"
    ids: Any = index
    while ids.target in FLAT_VIEWS | CASTS and is_integer(ids.args[0]):
        ids = ids.args[0]
    if not any(n.op in ("placeholder", "get_attr") for n in ancestors([ids])):
        return "indexed by a constant, not by routing ids"
    shaped: Node = ids
    while len(shape_of(shaped)) < 2 and (above := _same_elements(shaped)):
        shaped = above
    shape = shape_of(shaped)
    count, top_k = index.meta["val"].numel(), shape[-1] if len(shape) > 1 else 1
    if count // top_k < 2:
        return "fewer than two tokens"
    return Branches(ids, count // top_k, top_k)


def _same_elements(node: Node) -> Node | None:
    """The integer input of an elementwise op or view: the shape of the ids is its shape."""
    if node.target not in FLAT_VIEWS and rule_for(node.target) is not pointwise:
        return None
    size = node.meta["val"].numel()
    same = [n for n in node.all_input_nodes if is_integer(n) and n.meta["val"].numel() == size]
    return same[0] if same else None


def is_integer(node: Any) -> bool:
    """Whether a node is a tensor of a dtype that indexes."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)


def row_index(node: Node) -> tuple[Node, Node] | None:
    """(source, index) if the node takes whole rows of the source's first dim by a tensor index."""
    args: Any = node.args
    if node.target is aten.index.Tensor:
        return (args[0], args[1][0]) if len(args[1]) == 1 else None
    if node.target is aten.index_select.default and args[1] == 0:
        return args[0], args[2]
    if node.target is aten.embedding.default and len(args) == 2:
        return args[0], args[1]
    if node.target is aten.gather.default and len(shape_of(node)) == 1:
        return args[0], args[2]
    return None


class IdsProbe:
    """What index nodes mean, as functions of the ids in [0, experts).

    permutation: the node that sorts the branches by expert, where there is one.
    """

    def __init__(self, branches: Branches, experts: int, permutation: Node | None = None):
        self._branches, self._experts, self._permutation = branches, experts, permutation
        value = branches.ids.meta["val"]
        flat = _probe_ids(branches.count, experts)
        self._memos = [{branches.ids: f.to(value.dtype).reshape(value.shape)} for f in flat]
        self._roles: dict[Node, str | None] = {}
        # What follows from the ids alone; found forwards, the graph may be deep.
        self._known = {branches.ids}
        for node in branches.ids.graph.nodes:
            random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            known = all(n in self._known for n in node.all_input_nodes)
            if node.op == "call_function" and known and not random:
                self._known.add(node)

    def role(self, node: Node) -> str | None:
        """What the elements of an index node are, branches numbered t * K + k.

        "token" of each branch, in branch order; and, with the branches sorted by expert: "branch",
        "sorted_ids", "sorted_token"; "position" of each branch among the sorted ones; "ends" [E],
        where each expert's branches end among them. Found once: later calls may be under tracing.
        """
        if node not in self._roles:
            top_k, count = self._branches.top_k, self._branches.count
            tests: dict[str, Callable[..., Tensor]] = {
                "token": lambda ids, order: torch.arange(count) // top_k
            }
            if self._permutation is not None:
                tests |= {
                    "branch": lambda ids, order: order,
                    "position": lambda ids, order: torch.argsort(order),
                    "sorted_token": lambda ids, order: order // top_k,
                    "sorted_ids": lambda ids, order: ids[order],
                    "ends": lambda ids, order: torch.bincount(ids, minlength=self._experts).cumsum(
                        0
                    ),
                }
            self._roles[node] = next((r for r, t in tests.items() if self._is(node, t)), None)
        return self._roles[node]

    def sorts(self) -> bool:
        """Whether the permutation really lists the branches by ascending expert."""

        def claim(ids: Tensor, order: Tensor) -> bool:
            whole = same_values(order.sort()[0], torch.arange(ids.numel()))
            return whole and bool((ids[order].diff() >= 0).all())

        return self._permutation is not None and self._holds([self._permutation], claim)

    def _is(self, node: Node, expected: Callable[..., Tensor]) -> bool:
        order = self._permutation
        if order is None:
            return self._holds([node], lambda ids, v: same_values(v, expected(ids, None)))
        return self._holds([node, order], lambda ids, v, o: same_values(v, expected(ids, o)))

    def _holds(self, nodes: Sequence[Node], claim: Callable[..., bool]) -> bool:
        if any(n not in self._known for n in nodes):
            return False
        for memo in self._memos:
            values = [_evaluate(n, memo) for n in nodes]
            if any(v is None for v in values):
                return False
            if not claim(memo[self._branches.ids].reshape(-1).long(), *values):
                return False
        return True


def _probe_ids(count: int, experts: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    each = torch.arange(count) % experts
    full = [torch.full((count,), e) for e in {0, experts // 2, experts - 1}]
    two = torch.where(torch.arange(count) % 3 == 0, 0, experts - 1)
    random = [torch.randint(0, experts, (count,), generator=generator) for _ in range(3)]
    return [each, each.flip(0), each.sort()[0], two, *full, *random]


def _evaluate(node: Node, memo: dict[Node, Any]) -> Any:
    """The node's concrete value on the CPU; None where an op rejects the probe's values."""
    if node not in memo:
        inputs = {n: _evaluate(n, memo) for n in node.all_input_nodes}
        if any(v is None for v in inputs.values()):
            memo[node] = None
            return None
        args = torch.fx.map_arg((node.args, node.kwargs), inputs.__getitem__)
        args, kwargs = map_leaves(_on_cpu, args)
        try:
            memo[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        except RuntimeError:
            memo[node] = None
    return memo[node]


def _on_cpu(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) else value


def same_values(left: Tensor, right: Tensor) -> bool:
    """Equal elements in row-major order, whatever shape and dtype."""
    return left.numel() == right.numel() and torch.equal(
        left.reshape(-1).double(), right.reshape(-1).double()
    )
