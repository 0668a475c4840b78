"""A tracker shown a sampling loop, and what one generation looks like to it."""

from __future__ import annotations

import torch
from torch import Tensor

from moeca_compile.runtime.session import SessionTracker, StepInfo
from runtime.schedules import Call

LABELS, NULL = torch.tensor([3, 5]), torch.tensor([10, 10])


def run(tracker: SessionTracker, calls: list[Call], *conditioning: object) -> list[StepInfo]:
    given = conditioning or (LABELS,)
    return [tracker.observe(t, given, x) for t, x in calls]


def assert_one_generation(infos: list[StepInfo], number: int = 0) -> None:
    assert infos[0].fresh and infos[0].new_generation
    assert {i.generation for i in infos} == {number}
    stopped = [(i.step, i.reason) for i in infos[1:] if i.fresh]
    assert not stopped


def arguments(call: Call, *conditioning: object) -> tuple[float, tuple[object, ...], Tensor]:
    """As `SessionTracker.observe` takes them."""
    return call[0], conditioning, call[1]
