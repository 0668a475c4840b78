"""Compiled entries by the module they were compiled for, held weakly.

    register(root, entry)                when the backend made it
    entries_of(torch.compile(model))     for stats, reset, generation
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import SessionError
from ..torch_compat import compiled_root
from .entry import CompiledEntry


@dataclass
class Registry:
    """Entries per root; `orphans` were compiled from something that leads to no module."""

    _entries: weakref.WeakKeyDictionary[nn.Module, list[CompiledEntry]] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    orphans: list[CompiledEntry] = field(default_factory=list)
    _open: weakref.WeakKeyDictionary[nn.Module, ExitStack] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def add(self, root: nn.Module | None, entry: CompiledEntry) -> None:
        """Remember an entry of `root`."""
        if root is None:
            self.orphans.append(entry)
        else:
            self._entries.setdefault(root, []).append(entry)
            if root in self._open:
                self._open[root].enter_context(entry.tracker.generation())

    def entries_of(self, compiled: nn.Module | Callable[..., Any]) -> list[CompiledEntry]:
        """Entries made for a compiled module or function so far; empty before its first call.

        Raises TypeError for something that leads to no module.
        """
        return self._entries.get(self._root(compiled), [])

    @staticmethod
    def _root(compiled: nn.Module | Callable[..., Any]) -> nn.Module:
        root = compiled_root(compiled)
        if root is None:
            raise TypeError(
                "expected what torch.compile returned for a module or its method, got "
                f"{type(compiled).__name__}; pass the compiled model"
            )
        return root

    @contextmanager
    def generation(self, compiled: nn.Module | Callable[..., Any]) -> Iterator[None]:
        """One generation on all entries of `compiled`, those compiled meanwhile included.

        Raises SessionError when one is open already, TypeError as `entries_of`.
        """
        root = self._root(compiled)
        if root in self._open:
            raise SessionError("generation: expected no open generation of this model, found one")
        with ExitStack() as stack:
            self._open[root] = stack
            stack.callback(self._open.pop, root)
            for entry in self._entries.get(root, []):
                stack.enter_context(entry.tracker.generation())
            yield

    def clear(self) -> None:
        """Forget all entries (torch._dynamo.reset())."""
        self._entries.clear()
        self.orphans.clear()


REGISTRY = Registry()
