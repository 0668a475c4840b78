"""Typed results of matching: regions that can be cached by row, and near misses with a reason.

MoERegion        routed_experts node, router ids / weights [T, K], combine, shared experts
AttentionRegion  root [B, N, D] down to the attention core, with row-cached K and V
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.fx import Node

from .chosen import Groups
from .layout import Layout, RowSpace

PACKAGE = str(Path(__file__).parents[1])
ORIGIN = ("nn_module_stack", "stack_trace")  # where in the user's code a node comes from


@dataclass(frozen=True)
class NoMatch:
    """Something that looks like a region but is refused. kind: "moe" or "attention"."""

    kind: str
    name: str
    reason: str
    node: Node


@dataclass(frozen=True)
class RowRoot:
    """A value cached by token row: its node and where the rows are in it."""

    node: Node
    layout: Layout


@dataclass(frozen=True)
class StreamPart:
    """Rows [start, start + tokens) of an attention's output over several streams."""

    node: Node
    layout: Layout
    space: RowSpace
    start: int


@dataclass(frozen=True)
class AttentionRegion:
    """Attention from its output `root` to the `core` (SDPA or the product with V).

    key_value: K and V where their rows are the query's tokens. input: what the first projection of
    the queries reads. stream: the value above it that its rows are gathered from in a reuse step.
    beside: rows of other streams from the same core, computed in full.
    """

    name: str
    space: RowSpace
    root: RowRoot
    core: Node
    key_value: tuple[RowRoot, ...]
    input: RowRoot
    beside: tuple[StreamPart, ...] = ()
    stream: RowRoot | None = None


@dataclass(frozen=True)
class MoERegion:
    """Router -> experts -> combine. `attention`: regions synchronised with this layer's routing."""

    name: str
    space: RowSpace
    routed: Node
    ids: Node
    weights: Node
    rows: tuple[Node, ...]
    combine: Node
    num_experts: int
    top_k: int
    shared: tuple[RowRoot, ...] = ()
    attention: tuple[AttentionRegion, ...] = ()

    @property
    def branches(self) -> int:
        """Branches of a step, all samples together."""
        return self.space.rows * self.top_k

    @property
    def open_ended(self) -> bool:
        """Whether how many branches there are depends on the data; `branches` is then the most."""
        return False

    @property
    def groups(self) -> int:
        """Groups of tokens that share a budget and a scale of scores: the samples."""
        return self.space.samples

    def expert_of(self, ids: Tensor) -> Tensor:
        """Expert of each of the cached `ids`; of an empty slot any number."""
        return ids

    @property
    def routing(self) -> tuple[Node, ...]:
        """All that the router hands on: one step uses one value of each."""
        return (self.ids, self.weights)

    @property
    def description(self) -> str:
        """For tables: how many experts, and who chooses how many."""
        return f"{self.num_experts} experts, top-{self.top_k}, {len(self.shared)} shared"


@dataclass(frozen=True)
class ChoiceRegion(MoERegion):
    """Experts that pick their tokens. ids: branch numbers [R], see graph/chosen.py; weights: the
    gates, R of them in the same order; top_k: the most branches a token can have, E.

    beside: further values that the picks decide and the combine reads. valid: which of the places
    hold a branch, where the experts' numbers of tokens depend on the data.
    """

    places: int = 0
    chosen: Groups = Groups(1, 1)
    beside: tuple[Node, ...] = ()
    valid: Node | None = None

    @property
    def branches(self) -> int:
        return self.places

    def expert_of(self, ids: Tensor) -> Tensor:
        return ids % self.num_experts

    @property
    def open_ended(self) -> bool:
        return self.valid is not None

    @property
    def groups(self) -> int:
        return self.chosen.count

    @property
    def routing(self) -> tuple[Node, ...]:
        given = (self.ids, self.weights, *([] if self.valid is None else [self.valid]))
        return (*given, *(n for n in self.beside if n not in given))

    @property
    def description(self) -> str:
        tokens = self.space.rows // self.groups
        each = self.places // (self.num_experts * self.groups)
        picked = f"picking up to {each}" if self.valid is not None else f"picking {each}"
        whole = " of the whole batch" if self.groups < self.space.samples else ""
        text = f"{self.num_experts} experts {picked} of {tokens} tokens{whole}"
        return f"{text}, {len(self.shared)} shared"


@dataclass(frozen=True)
class Regions:
    """All that was matched in one graph, in graph order."""

    moe: tuple[MoERegion, ...]
    attention: tuple[AttentionRegion, ...]
    missed: tuple[NoMatch, ...] = ()
    needed: frozenset[Node] = frozenset()  # what a reuse step evaluates on all rows

    @property
    def paired(self) -> tuple[AttentionRegion, ...]:
        return tuple(a for m in self.moe for a in m.attention)


def module_path(node: Node) -> str:
    """Module path of a node, e.g. `blocks.0.moe`; its own name where the trace has none.

    In a compiled function it starts with the variable that holds the model: `model.blocks.0.moe`.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"^L\['(?:self|fn)'\]\.?|^self\.?", "", path)
    path = re.sub(r"^[LG]\['([^']+)'\]", r"\1", path)  # a variable of a compiled function
    path = re.sub(r"(?:__dict__\[')?_modules(?:'\])?\['([^']+)'\]", r"\1", path)
    path = re.sub(
        r"\._modules\.|\[(\d+)\]", lambda m: f".{m.group(1)}" if m.group(1) else ".", path
    )
    return path or "(root)"


def source_line(node: Node) -> str:
    """`file:line` in the user's code that made the node; empty where the trace has none."""
    found = re.findall(r'File "([^"]+)", line (\d+)', str(node.meta.get("stack_trace") or ""))
    found = [f for f in found if not f[0].startswith(PACKAGE)]  # captured code is not the user's
    return f"{found[-1][0]}:{found[-1][1]}" if found else ""
