"""Recognising a dispatch by values: which locals are expert numbers, rows and weights.

    locals {x [6, 4], idx [6, 2], w [6, 2]}, expert calls, result [6, 4]
        ->  DispatchPlan(ids="idx", rows="x", combine="weighted", weights="w", layout="flat")

Names carry no meaning here. Every plan returned reproduces the recorded result; that it does so for
other routings and inputs is checked by the probes of the two mechanisms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .expert_call import ExpertCall
from .expert_template import ExpertTemplate
from .observe import counts_match, is_integer
from .plan import (
    CONSTANT,
    ROWS,
    VALUE,
    Argument,
    DispatchPlan,
    finish_plan,
    run_branches,
)
from .replay import close

_LAYOUTS = ("flat", "lead", "merged")


@dataclass(frozen=True)
class Evidence:
    """What was recorded while the owner ran: its experts' calls.

    template: the body of experts that are slices of parameters. computed: see `_branches`.
    """

    owner: nn.Module
    bank_path: tuple[str, ...]
    experts: int
    calls: tuple[ExpertCall, ...]
    template: ExpertTemplate | None = None
    computed: dict[Any, tuple[Tensor | None, list[Any]]] = field(default_factory=dict)

    @property
    def counts(self) -> dict[int, int]:
        """Rows per expert."""
        counts: dict[int, int] = {}
        for call in self.calls:
            counts[call.expert] = counts.get(call.expert, 0) + call.rows
        return counts

    @property
    def width(self) -> int:
        """Columns of the experts' outputs, 0 if those are not matrices aligned with the rows."""
        outputs = [call.output for call in self.calls]
        aligned = all(
            isinstance(out, Tensor) and out.dim() == 2 and out.shape[0] == call.rows
            for out, call in zip(outputs, self.calls)
        )
        widths = {out.shape[1] for out in outputs} if aligned else set()
        return widths.pop() if len(widths) == 1 else 0


def propose(
    evidence: Evidence, values: Mapping[str, Any], target: Any, target_name: str = ""
) -> Iterator[DispatchPlan]:
    """Plans over the locals `values` that reproduce `target`, fewest tokens (most slots) first.

    target_name: when `values` holds an earlier value of it, plans that add to that are tried too.
    """
    width = evidence.width
    if not width or not isinstance(target, Tensor) or not target.is_floating_point():
        return
    if target.numel() % width:
        return
    for plan in _dispatches(evidence, values):
        tokens = values[plan.ids].numel() // plan.slots
        if target.numel() not in (tokens * width, tokens * plan.slots * width):
            continue
        branches = _branches(evidence, plan, values)
        if branches is None:
            continue
        yield from _finishes(plan, branches, values, target, target_name)


def _branches(evidence: Evidence, plan: DispatchPlan, values: Mapping[str, Any]) -> Tensor | None:
    """`run_branches`, once per plan and values: it runs every expert on every row."""
    arguments = (*plan.positional, *(argument for _, argument in plan.keyword))
    names = (plan.ids, *(argument.name for argument in arguments))
    key = (plan, tuple(id(values.get(name)) for name in names))
    if key not in evidence.computed:
        used = [values.get(name) for name in names]  # keeps the ids in the key taken
        try:
            evidence.computed[key] = (run_branches(plan, evidence.owner, values), used)
        except Exception:  # user code on a wrong guess may fail in any way: not this plan
            evidence.computed[key] = (None, used)
    return evidence.computed[key][0]


def _dispatches(evidence: Evidence, values: Mapping[str, Any]) -> Iterator[DispatchPlan]:
    id_names = [
        name
        for name, value in values.items()
        if is_integer(value) and counts_match(value, evidence.counts, evidence.experts)
    ]
    found: list[tuple[int, DispatchPlan]] = []
    for name, slots_first in itertools.product(id_names, (False, True)):
        for slots, positional, keyword in _argument_sets(
            evidence, values, values[name], slots_first
        ):
            plan = DispatchPlan(
                evidence.bank_path, evidence.experts, slots, name, slots_first, positional, keyword,
                combine="none", weights="", dense_weights=False, layout="flat", accumulate="",
                dtype_name="", template=evidence.template,
            )  # fmt: skip
            if not (slots_first and slots == 1):
                found.append((slots, plan))
    found.sort(key=lambda item: (-item[0], item[1].slots_first))
    yield from (plan for _, plan in found)


def _argument_sets(
    evidence: Evidence, values: Mapping[str, Any], ids: Tensor, slots_first: bool
) -> Iterator[tuple[int, tuple[Argument, ...], tuple[tuple[str, Argument], ...]]]:
    first = evidence.calls[0]
    keys = tuple(first.kwargs)
    if any(len(c.args) != len(first.args) or tuple(c.kwargs) != keys for c in evidence.calls):
        return
    places = [*range(len(first.args)), *keys]
    per_place = [list(_sources(evidence, values, ids, place, slots_first)) for place in places]
    for choice in itertools.product(*per_place):
        token_counts = {tokens for tokens, _ in choice if tokens}
        if len(token_counts) != 1:
            continue
        slots = ids.numel() // token_counts.pop()
        arguments = tuple(argument for _, argument in choice)
        split = len(first.args)
        yield slots, arguments[:split], tuple(zip(keys, arguments[split:]))


def _sources(
    evidence: Evidence, values: Mapping[str, Any], ids: Tensor, place: int | str, slots_first: bool
) -> Iterator[tuple[int, Argument]]:
    """(tokens, argument) pairs; tokens is 0 for arguments that are not row-aligned."""
    seen = [
        call.args[place] if isinstance(place, int) else call.kwargs[place]
        for call in evidence.calls
    ]
    if not any(isinstance(value, Tensor) for value in seen):
        yield from _untensored(values, seen)
        return
    if not all(isinstance(value, Tensor) and value.dim() for value in seen):
        return
    if all(value.shape == seen[0].shape and torch.equal(value, seen[0]) for value in seen):
        same = [name for name, value in values.items() if _equal(value, seen[0])]
        if same and not all(v.shape[0] == c.rows for v, c in zip(seen, evidence.calls)):
            yield 0, Argument(VALUE, same[0])
            return
    if any(v.shape[0] != c.rows for v, c in zip(seen, evidence.calls)):
        return
    for name, value in values.items():
        flatten = _leading(value, seen[0])
        if not flatten:
            continue
        tokens = value.shape[:flatten].numel()
        if tokens and ids.numel() % tokens == 0 and ids.numel() // tokens <= evidence.experts:
            flat = value.flatten(0, flatten - 1) if flatten > 1 else value
            if _rows_fit(evidence, seen, flat, ids, slots_first):
                yield tokens, Argument(ROWS, name, flatten)


def _untensored(values: Mapping[str, Any], seen: list[Any]) -> Iterator[tuple[int, Argument]]:
    first = seen[0]
    if all(value is first for value in seen):
        names = [name for name, value in values.items() if value is first]
        if isinstance(first, (bool, int, float, str, type(None))):
            yield 0, Argument(CONSTANT, constant=first)
        elif names:
            yield 0, Argument(VALUE, names[0])


def _equal(value: Any, tensor: Tensor) -> bool:
    same_kind = (
        isinstance(value, Tensor) and value.shape == tensor.shape and value.dtype == tensor.dtype
    )
    return same_kind and torch.equal(value, tensor)


def _leading(value: Any, row_block: Tensor) -> int:
    """How many leading dims of `value` make up the rows of `row_block` [R, ...], 0 if none do."""
    if not isinstance(value, Tensor) or value.dtype != row_block.dtype:
        return 0
    flatten = value.dim() - row_block.dim() + 1
    if flatten < 1 or value.shape[flatten:] != row_block.shape[1:]:
        return 0
    return flatten


def _rows_fit(
    evidence: Evidence, seen: list[Tensor], flat: Tensor, ids: Tensor, slots_first: bool
) -> bool:
    """Whether each expert saw rows with the same column sums as the rows its ids point at."""
    tokens = flat.shape[0]
    by_token = ids.reshape(-1, tokens).t() if slots_first else ids.reshape(tokens, -1)
    for index in range(evidence.experts):
        blocks = [v for v, c in zip(seen, evidence.calls) if c.expert == index]
        here = (by_token == index).nonzero()[:, 0]
        if here.numel() == 0:
            continue
        got = torch.cat(blocks)
        # an expert that a token names twice may receive its row once
        if not any(_same_sums(got, flat[rows]) for rows in (here, here.unique())):
            return False
    return True


def _same_sums(got: Tensor, want: Tensor) -> bool:
    """Whether the columns of two sets of rows add up to the same."""
    scale = float(want.abs().max())
    if not math.isfinite(scale):  # a buffer that was never written
        return False
    sums = got.double().sum(0), want.double().sum(0)
    return torch.allclose(*sums, rtol=1e-4, atol=1e-4 * (scale + 1e-6))


def _finishes(
    plan: DispatchPlan, branches: Tensor, values: Mapping[str, Any], target: Tensor, name: str
) -> Iterator[DispatchPlan]:
    old = values.get(name)
    adds = isinstance(old, Tensor) and old.shape == target.shape and bool(old.any())
    bases = ("", name) if adds else ("",)
    for candidate in _combinations(plan, values):
        for layout, base in itertools.product(_LAYOUTS, bases):
            if layout == "lead" and candidate.rows_argument.flatten == 1:
                continue
            if layout == "merged" and candidate.combine != "none":
                continue
            finished = replace(candidate, layout=layout, accumulate=base)
            if _expected_shape(finished, branches, values) != target.shape:
                continue
            if close(finish_plan(finished, branches, values), target):
                yield finished
                break


def _expected_shape(
    plan: DispatchPlan, branches: Tensor, values: Mapping[str, Any]
) -> tuple[int, ...]:
    tokens, slots, width = branches.shape
    if plan.layout == "merged":
        return (tokens * slots, width)
    argument = plan.rows_argument
    lead = (
        tuple(values[argument.name].shape[: argument.flatten])
        if plan.layout == "lead"
        else (tokens,)
    )
    return (*lead, width) if plan.combine != "none" else (*lead, slots, width)


def _combinations(plan: DispatchPlan, values: Mapping[str, Any]) -> Iterator[DispatchPlan]:
    """Weighted ones first: weights that are all one here (softmax of a top-1) fit with and without
    the product, and only the probes, which change the weights, can tell."""
    size, tokens = values[plan.ids].numel(), values[plan.ids].numel() // plan.slots
    for name, value in values.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if value.numel() == size:
            yield replace(plan, combine="weighted", weights=name)
        if value.numel() == tokens * plan.experts and value.shape[-1] == plan.experts:
            yield replace(plan, combine="weighted", weights=name, dense_weights=True)
    yield plan
    yield replace(plan, combine="sum")
