"""When a replacement acts: only while Dynamo traces for this package's backend.

Eager users would otherwise pay for every expert on every row, and other backends would see a form
that they did not ask for.
"""

from __future__ import annotations

import functools
from typing import Any

from ..torch_compat import compiling_with

BACKEND_MARK = "_moeca_backend"
_INNER_ATTRIBUTES = ("compiler_fn", "__wrapped__", "inner_fn", "_torchdynamo_orig_backend")


def is_marked_backend(backend: Any) -> bool:
    """Whether `backend`, or anything it wraps, carries the mark of this package's backend."""
    pending, seen = [backend], set[int]()
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if getattr(current, BACKEND_MARK, False) is True:
            return True
        if isinstance(current, functools.partial):
            pending.append(current.func)
        pending.extend(getattr(current, name, None) for name in _INNER_ATTRIBUTES)
    return False


def compiling_for_moeca() -> bool:
    """The default `is_active`: true while Dynamo traces for this package's backend."""
    return compiling_with(is_marked_backend)
