"""Calls of a compiled model, each with what became of it.

ran = run(compiled, x, t, y)          ran.kind "refresh", "reuse", "plain" or "" (not cached)
assert_fresh(ran, model, x, t, y)     everything was computed: the eager output
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import moeca_compile

Call = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Ran:
    """One call. reason: why it was a refresh, else empty."""

    output: Tensor
    kind: str
    reason: str


def run(compiled: Any, *call: Any) -> Ran:
    """One call without gradients, and what the counters say about it."""
    before = moeca_compile.stats(compiled)
    with torch.no_grad():
        output = compiled(*call)
    now = moeca_compile.stats(compiled)
    kinds = ("refresh", "reuse", "plain")
    moved = [k for k in kinds if getattr(now, f"{k}_steps") > getattr(before, f"{k}_steps")]
    reasons = list(now.reasons - before.reasons)
    assert len(moved) <= 1
    assert len(reasons) == (moved == ["refresh"])
    return Ran(output, moved[0] if moved else "", reasons[0] if reasons else "")


def difference(output: Tensor, model: nn.Module, *call: Any) -> float:
    """||output - eager|| / ||eager||."""
    with torch.no_grad():
        eager = model(*call)
    assert output.shape == eager.shape
    assert output.dtype == eager.dtype
    return float((output.double() - eager.double()).norm() / eager.double().norm())


def assert_fresh(ran: Ran, model: nn.Module, *call: Any, tolerance: float = 1e-5) -> None:
    """No old row was read: counted as a refresh, and the output is the eager one."""
    assert ran.kind == "refresh"
    assert difference(ran.output, model, *call) <= tolerance


def assert_reused(ran: Ran, model: nn.Module, *call: Any) -> None:
    """Old rows were read, and it shows: the next refresh is no accident of equal outputs."""
    assert ran.kind == "reuse"
    assert difference(ran.output, model, *call) > 1e-4


def grown(call: Call) -> Call:
    """The same call with its first sample once more behind the last."""
    x, t, y = call
    return torch.cat([x, x[:1]]), torch.cat([t, t[:1]]), torch.cat([y, y[:1]])
