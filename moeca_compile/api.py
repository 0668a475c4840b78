"""Control and statistics of a compiled model, by what `torch.compile` returned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .runtime.entry import CompiledEntry
from .runtime.history import History
from .runtime.registry import REGISTRY
from .runtime.stats import Stats, merge_stats

Compiled = nn.Module | Callable[..., Any]


def stats(compiled: Compiled) -> Stats:
    """What ran since the last reset, over all input shapes; zeros before the first call.

    Raises TypeError for something that leads to no module.
    """
    return merge_stats([entry.stats() for entry in REGISTRY.entries_of(compiled)])


def reset(compiled: Compiled) -> None:
    """Forget all cached rows, lanes and counts; compiled code stays. Raises TypeError as stats."""
    for entry in REGISTRY.entries_of(compiled):
        entry.reset()


@contextmanager
def generation(compiled: Compiled) -> Iterator[None]:
    """One generation: entering starts it on all lanes, leaving ends it.

    Inside, a timestep that repeats, jumps or is missing starts nothing by itself (restart samplers,
    models without a timestep tensor). Raises SessionError when one is open already.
    """
    with REGISTRY.generation(compiled):
        yield


@contextmanager
def record(compiled: Compiled) -> Iterator[None]:
    """Remember every step of the block, one by one, for `report`; forgets what was recorded before.

    Costs a few small operations a step and layer, and a second copy of the expert inputs per lane.
    Raises TypeError as stats.
    """

    def start(entry: CompiledEntry) -> None:
        entry.history = History(entry.variants.analysis.plan, entry.options)

    with REGISTRY.attached(compiled, start):
        try:
            yield
        finally:
            for entry in REGISTRY.entries_of(compiled):
                if entry.history is not None:
                    entry.history.recording = False
