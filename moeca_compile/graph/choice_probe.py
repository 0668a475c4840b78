"""What the row numbers of picked tokens are, found by running them on concrete picks.

Row arithmetic is a function of the picks alone, so it is run on random ones and the result is
checked: every expert picks T / B different tokens at most once, and which sample a place belongs to
does not depend on the picks.

    picks [B, E, C]  ->  numbers [E * B * C]  ->  Groups(count=B, run=C), experts r // (B * C)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..torch_compat import map_leaves
from .choice_dispatch import Dispatch, NotChoice, Top
from .chosen import Groups
from .row_rules import shape_of

PROBES = 3


def probe_numbers(dispatch: Dispatch) -> list[Tensor]:
    """[R] row numbers for each of several random picks. Raises NotChoice."""
    found = []
    for picks in _random_picks(dispatch.top):
        index = concrete(dispatch.index, {dispatch.top.picks: picks})
        if index is None:
            raise NotChoice("row numbers that depend on more than the picks", dispatch.index)
        found.append(dispatch.numbers(index).long())
    return found


def _random_picks(top: Top) -> list[Tensor]:
    """Values as `topk` may give them: along its dim all different."""
    generator = torch.Generator().manual_seed(0)
    scores = shape_of(top.node.args[0])
    return [
        torch.rand(scores, generator=generator).topk(top.count, top.dim).indices
        for _ in range(PROBES)
    ]


def concrete(node: Node, known: dict[Node, Any]) -> Any:
    """The node's value on the CPU, from the `known` ones and constants; None if it needs others."""
    if node not in known:
        if node.op != "call_function":
            return None
        inputs = {n: concrete(n, known) for n in node.all_input_nodes}
        if any(v is None for v in inputs.values()):
            return None
        args = torch.fx.map_arg((node.args, node.kwargs), inputs.__getitem__)
        args, kwargs = map_leaves(
            lambda v: torch.device("cpu") if isinstance(v, torch.device) else v, args
        )
        known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known[node]


def find_groups(numbers: Sequence[Tensor], tokens: int, of: int, at: Node) -> Groups:
    """Groups of the places. numbers: of several probes. Raises NotChoice.

    of: how many tokens are picked from; all of them: one group.
    """
    count = tokens // of
    if tokens % of:
        raise NotChoice("tokens are picked from a part of the rows", at)
    first = torch.div(numbers[0], of, rounding_mode="floor")
    for groups in (Groups(count, run) for run in runs(first)):
        expected = groups.of_places(first.numel())
        if all(torch.equal(torch.div(n, of, rounding_mode="floor"), expected) for n in numbers):
            return groups
    raise NotChoice("which sample a row belongs to depends on the picks", at)


def find_experts(expert: Tensor, experts: int, at: Node) -> int:
    """How many places in a row are of one expert, if expert [R] is (r // run) % experts."""
    for run in runs(expert):
        whole = expert.numel() % (run * experts) == 0
        if whole and torch.equal(torch.arange(expert.numel()) // run % experts, expert):
            return run
    raise NotChoice("experts with different numbers of tokens", at)


def runs(values: Tensor) -> list[int]:
    """Candidates for the length of equal values in a row: up to the first change, or all."""
    changes = (values[1:] != values[:-1]).nonzero()
    return [int(changes[0]) + 1 if len(changes) else values.numel()]


def check_distinct(numbers: Sequence[Tensor], expert: Tensor, tokens: int, at: Node) -> None:
    """No expert gets a token twice, no number is out of range. Raises NotChoice."""
    for rows in numbers:
        branch = rows * (int(expert.max()) + 1) + expert
        inside = bool((rows >= 0).all()) and bool((rows < tokens).all())
        if not inside or branch.unique().numel() != branch.numel():
            raise NotChoice("an expert picks a row twice", at)
