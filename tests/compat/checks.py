"""Running a compiled third-party model step by step, with keyword arguments and nested outputs.

compiled = compile_case(model, calls[0], interval=4)
ran = step(compiled, calls[0])                 # ran.kind, ran.output
error_of(ran, model, calls[0])                 # against eager
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import moeca_compile
from compat.case import Call
from moeca_compile.backend import moeca
from moeca_compile.debug.compat import relative_error


@dataclass(frozen=True)
class Step:
    """One call. kind: refresh, reuse, plain; empty for plain Inductor."""

    output: Any
    kind: str


def compile_case(model: nn.Module, example: Call, **options: Any) -> Any:
    """Captured ahead of time, so that the first call is one graph."""
    moeca_compile.prepare(model, **example)
    return torch.compile(model, backend=moeca, options=options)


@torch.no_grad()
def step(compiled: Any, call: Call) -> Step:
    """One call, and what the counters say about it."""
    before = moeca_compile.stats(compiled)
    output = compiled(**call)
    now = moeca_compile.stats(compiled)
    kinds = ("refresh", "reuse", "plain")
    moved = [k for k in kinds if getattr(now, f"{k}_steps") > getattr(before, f"{k}_steps")]
    return Step(output, "".join(moved))


@torch.no_grad()
def error_of(ran: Step, model: nn.Module, call: Call) -> float:
    """||output - eager|| / ||eager||."""
    return relative_error(ran.output, model(**call))


def other_condition(call: Call, name: str) -> Call:
    """The same call with another conditioning input, as for the second half of guidance."""
    value: Tensor = call[name]
    changed = value.flip(0) if value.dtype.is_floating_point else (value + 1) % 10
    return {**call, name: changed}
