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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .layout import Factor, Layout, RowSpace, free_layout
from .row_rules import RESHAPES, pointwise, rule_for, shape_of

aten = torch.ops.aten
CASTS = {aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default}
# Changes of shape that keep the elements in row-major order.
FLAT_VIEWS = RESHAPES | {
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.alias.default,
    aten.detach.default,
}


@dataclass(frozen=True)
class Branches:
    """T x K branches. ids: a node whose elements in row-major order are branch t * K + k."""

    ids: Node
    tokens: int
    top_k: int

    @property
    def count(self) -> int:
        return self.tokens * self.top_k

    @property
    def space(self) -> RowSpace:
        """Tokens are the space's samples, slots its tokens; with one slot only tokens are left."""
        if self.top_k == 1:
            return RowSpace(1, self.tokens)
        return RowSpace(self.tokens, self.top_k)

    @property
    def tags(self) -> frozenset[str]:
        return frozenset("n" if self.top_k == 1 else "bn")

    @property
    def token_tags(self) -> frozenset[str]:
        return frozenset("n" if self.top_k == 1 else "b")

    def token_dim(self) -> Layout:
        return ((Factor(self.tokens, *self.token_tags),),)

    def layout(self, shape: Sequence[int]) -> Layout | None:
        """Branches in front of `shape`: [T, K, ...] or [T * K, ...]; None if they are not."""
        if self.top_k == 1:
            front = self.token_dim() if shape and shape[0] == self.tokens else None
        elif len(shape) > 1 and (shape[0], shape[1]) == (self.tokens, self.top_k):
            front = ((Factor(self.tokens, "b"),), (Factor(self.top_k, "n"),))
        elif shape and shape[0] == self.count:
            front = ((Factor(self.tokens, "b"), Factor(self.top_k, "n")),)
        else:
            front = None
        return None if front is None else (*front, *free_layout(shape[len(front) :]))


def branches_of(index: Node) -> Branches | str:
    """The branches that an index lists in order, or why it is no list of routing ids."""
    if not is_integer(index):
        return f"indexed by {index.meta['val'].dtype}, not by integer routing ids"
    ids = index
    while ids.target in FLAT_VIEWS | CASTS and is_integer(ids.args[0]):
        ids = ids.args[0]  # type: ignore[assignment]
    if _is_constant(ids):
        return "indexed by a constant, not by routing ids"
    shaped = ids
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
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return False
    return not (value.is_floating_point() or value.is_complex())


def row_index(node: Node) -> tuple[Node, Node] | None:
    """(source, index) if the node takes whole rows of the source's first dim by a tensor index."""
    if node.target is aten.index.Tensor:
        source, indices = node.args
        if len(indices) == 1 and isinstance(indices[0], Node):  # type: ignore[arg-type]
            return source, indices[0]  # type: ignore[index,return-value]
        return None
    if node.target is aten.index_select.default and node.args[1] == 0:
        return node.args[0], node.args[2]  # type: ignore[return-value]
    if node.target is aten.embedding.default and len(node.args) == 2:
        return node.args[0], node.args[1]  # type: ignore[return-value]
    if node.target is aten.gather.default and len(shape_of(node)) == 1:
        return node.args[0], node.args[2]  # type: ignore[return-value]
    return None


def _is_constant(node: Node) -> bool:
    if node.op != "call_function":
        return False
    return all(_is_constant(n) for n in node.all_input_nodes)


class IdsProbe:
    """Values of index nodes for probe ids. experts: E, the ids are in [0, E)."""

    def __init__(self, branches: Branches, experts: int):
        self._ids = branches.ids
        value = branches.ids.meta["val"]
        flat = _probe_ids(branches.count, experts)
        self._memos = [{branches.ids: f.to(value.dtype).reshape(value.shape)} for f in flat]

    def holds(self, nodes: Sequence[Node], claim: Callable[..., Tensor | bool]) -> bool:
        """Whether `claim(ids [T * K], *values of nodes)` is true for every probe.

        False as well if a node depends on anything but the ids.
        """
        for memo in self._memos:
            values = [_evaluate(n, memo) for n in nodes]
            if any(v is None for v in values):
                return False
            if not bool(claim(memo[self._ids].reshape(-1).long(), *values)):
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
    """The node's concrete value on the CPU; None unless it follows from the ids alone."""
    if node not in memo:
        memo[node] = _run(node, memo)
    return memo[node]


def _run(node: Node, memo: dict[Node, Any]) -> Any:
    if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(
        node.target, "tags", ()
    ):
        return None
    inputs = {n: _evaluate(n, memo) for n in node.all_input_nodes}
    if any(v is None for v in inputs.values()):
        return None
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:  # a write must not reach the memo
        inputs = {n: v.clone() if isinstance(v, Tensor) else v for n, v in inputs.items()}

    def concrete(value: Any) -> Any:
        return torch.device("cpu") if isinstance(value, torch.device) else value

    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), inputs.__getitem__)
    args, kwargs = torch.utils._pytree.tree_map(concrete, (args, kwargs))
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except RuntimeError:  # an op that rejects these values: no claim can be made
        return None


def same_values(left: Tensor, right: Tensor) -> bool:
    """Equal elements in row-major order, whatever shape and dtype."""
    return left.numel() == right.numel() and torch.equal(
        left.reshape(-1).double(), right.reshape(-1).double()
    )
