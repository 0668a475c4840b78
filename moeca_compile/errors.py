"""Every error this package raises on purpose, so that a caller can catch them by kind.

raise PassError("insert_cache", node, expected="a [T, K] router weight", found="[T]",
                next_step="run explain() on the model")
->  insert_cache: node %topk_3: expected a [T, K] router weight, found [T]; run explain() ...
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoecaError(Exception):
    """Base of all errors of this package."""


class OptionsError(MoecaError, ValueError):
    """An option that does not exist, or a value outside its range."""


class OptionsTypeError(OptionsError, TypeError):
    """An option of the wrong type."""


class SessionError(MoecaError, RuntimeError):
    """Generation control used in an order that has no meaning."""


class UnsupportedError(MoecaError, RuntimeError):
    """The model or its state cannot be cached and `strict=True` asked for an error."""


class PassError(MoecaError, RuntimeError):
    """A compiler pass met a graph that breaks its contract."""

    def __init__(
        self, pass_name: str, node: object, *, expected: str, found: str, next_step: str
    ) -> None:
        super().__init__(
            f"{pass_name}: node {node}: expected {expected}, found {found}; {next_step}"
        )
        self.pass_name = pass_name
        self.node = node


def name_nearest(wrong: object, valid: Iterable[str]) -> str:
    """`; did you mean 'x'? valid: a, b, x` for an error message; no guess when none is close."""
    names = sorted(valid)
    near = difflib.get_close_matches(str(wrong).lower(), names, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{guess} valid: {', '.join(names)}"
