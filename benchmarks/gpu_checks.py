"""Whether a variant of a compiled model waits for its GPU: gpu.py, tests/speed/test_cuda.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moeca_compile.runtime.registry import REGISTRY


@contextmanager
def no_waiting(compiled: Any) -> Iterator[None]:
    """Inside, a variant that synchronises raises. Placing a call reads a few numbers of the sample
    and the timestep, once and outside of its graph; that is allowed."""
    entries = REGISTRY.entries_of(compiled)
    originals = [entry.variants.get for entry in entries]

    def watched(get: Callable[[str], Any]) -> Callable[[str], Any]:
        def variant(kind: str) -> Any:
            inner = get(kind)

            def run(*args: Any) -> Any:
                torch.cuda.set_sync_debug_mode("error")
                try:
                    return inner(*args)
                finally:
                    torch.cuda.set_sync_debug_mode("default")

            return run

        return variant

    try:
        for entry, original in zip(entries, originals, strict=True):
            entry.variants.get = watched(original)  # type: ignore[method-assign]
        yield
    finally:
        for entry, original in zip(entries, originals, strict=True):
            entry.variants.get = original  # type: ignore[method-assign]
