"""Compiled entries by the module they were compiled for, held weakly.

add(root, entry, settings)           when the backend made it
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
from ..torch_compat import backend_settings, compiled_root
from .entry import CompiledEntry

Settings = dict[str, Any]  # what torch.compile hands the backend: options and mode, as given


@dataclass(frozen=True)
class _Opened:
    """An open generation. settings: of one compilation of the root; None: of all of them."""

    settings: Settings | None
    stack: ExitStack

    def overlaps(self, settings: Settings | None) -> bool:
        return self.settings is None or settings is None or self.settings == settings


@dataclass(frozen=True)
class _Watch:
    """Someone who wants every entry of one compilation of a root; settings as in `_Opened`."""

    settings: Settings | None
    attach: Callable[[CompiledEntry], None]


@dataclass
class Registry:
    """Entries per root; `orphans` were compiled from something that leads to no module.

    One module compiled with different options has separate entries for each of them, as Dynamo
    has; with equal options Dynamo shares the code, hence entries, rows and counts are shared.
    """

    _entries: weakref.WeakKeyDictionary[nn.Module, list[tuple[Settings, CompiledEntry]]] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    orphans: list[CompiledEntry] = field(default_factory=list)
    _open: weakref.WeakKeyDictionary[nn.Module, list[_Opened]] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    _watches: weakref.WeakKeyDictionary[nn.Module, list[_Watch]] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def add(self, root: nn.Module | None, entry: CompiledEntry, settings: Settings) -> None:
        """Remember an entry of `root`, compiled with `settings`."""
        if root is None:
            self.orphans.append(entry)
            return
        known = self._entries.setdefault(root, [])
        for given, other in known:
            if given == settings:
                entry.turns = other.turns
        known.append((settings, entry))
        for watch in self._watches.get(root, []):
            if watch.settings is None or watch.settings == settings:
                watch.attach(entry)
        for opened in self._open.get(root, []):
            if opened.overlaps(settings):
                opened.stack.enter_context(entry.tracker.generation())

    def entries_of(self, compiled: nn.Module | Callable[..., Any]) -> list[CompiledEntry]:
        """Entries made for a compiled module or function so far; empty before its first call.

        A module that is not itself compiled stands for all its compilations. Raises TypeError for
        something that leads to no module.
        """
        root, settings = self._root(compiled), backend_settings(compiled)
        known = self._entries.get(root, [])
        return [entry for given, entry in known if settings is None or given == settings]

    def holds(self, root: nn.Module) -> bool:
        """Whether any entry was made for `root`."""
        return bool(self._entries.get(root))

    def calls_of(self, root: nn.Module) -> int:
        """How often entries of `root` have been called."""
        return sum(entry.calls for _, entry in self._entries.get(root, []))

    def release(self, root: nn.Module) -> None:
        """Free the rows of all entries of `root`: they will not be called again, others will."""
        for _, entry in self._entries.get(root, []):
            entry.release()

    @staticmethod
    def _root(compiled: nn.Module | Callable[..., Any]) -> nn.Module:
        root = compiled_root(compiled)
        if root is None:
            raise TypeError(
                "expected what torch.compile returned for a module or its method, got "
                f"{type(compiled).__name__}; pass the compiled model, or the model that a compiled "
                "function calls"
            )
        return root

    @contextmanager
    def generation(self, compiled: nn.Module | Callable[..., Any]) -> Iterator[None]:
        """One generation on all entries of `compiled`, those compiled meanwhile included.

        Raises SessionError when one is open already, TypeError as `entries_of`.
        """
        root, settings = self._root(compiled), backend_settings(compiled)
        opened = self._open.setdefault(root, [])
        if any(other.overlaps(settings) for other in opened):
            raise SessionError("generation: expected no open generation of this model, found one")
        with ExitStack() as stack:
            opened.append(_Opened(settings, stack))
            stack.callback(opened.remove, opened[-1])
            for entry in self.entries_of(compiled):
                stack.enter_context(entry.tracker.generation())
            yield

    @contextmanager
    def attached(
        self, compiled: nn.Module | Callable[..., Any], attach: Callable[[CompiledEntry], None]
    ) -> Iterator[None]:
        """Hand all entries of `compiled` to `attach`, those compiled meanwhile included."""
        root = self._root(compiled)
        watches = self._watches.setdefault(root, [])
        watch = _Watch(backend_settings(compiled), attach)
        for entry in self.entries_of(compiled):
            attach(entry)
        watches.append(watch)
        try:
            yield
        finally:
            watches.remove(watch)

    def clear(self) -> None:
        """Forget all entries (torch.compiler.reset())."""
        self._entries.clear()
        self.orphans.clear()


REGISTRY = Registry()
