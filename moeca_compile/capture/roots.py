"""Root modules: which one a compiled call is about, and how far each has come with capture."""

from __future__ import annotations

import enum
import functools
import inspect
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from ..torch_compat import CompileCall, compile_call, outermost_module
from .activity import compiling_for_moeca
from .report import CaptureReport

_MODULE_FILE = nn.Module.__call__.__code__.co_filename


@dataclass(frozen=True)
class RootCall:
    """The outermost compiled call on this thread: its module and what it was called with."""

    root: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    call: CompileCall


class Phase(enum.Enum):
    """How far a root has come."""

    NEW = "not analysed"
    INSTALLED = "installed, the call that triggered it still runs"
    WAITING = "installed, next trace decides"
    CAPTURED = "all dispatches captured in one graph"
    REFUSED = "left in fragments"


@dataclass
class RootState:
    """What is known of one root; graphs are counted as backend calls.

    postponed: the call at hand runs with gradients or in training mode, so nothing is decided.
    """

    phase: Phase = Phase.NEW
    report: CaptureReport | None = None
    reason: str = ""
    graphs_before: int = 0
    graphs_after: int = 0
    postponed: bool = False
    judging: bool = False


@dataclass
class RootRegistry:
    """States by root module, held weakly. is_active: see `install`."""

    is_active: Callable[[], bool] = compiling_for_moeca
    _states: weakref.WeakKeyDictionary[nn.Module, RootState] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    _roots: weakref.WeakKeyDictionary[FunctionType, weakref.ref[nn.Module]] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def state(self, root: nn.Module) -> RootState:
        """The state of `root`, made on first sight."""
        if root not in self._states:
            self._states[root] = RootState()
        return self._states[root]

    def find(self, root: nn.Module) -> RootState | None:
        """The state of `root`, None if it was never seen."""
        return self._states.get(root)

    def remember(self, call: RootCall) -> None:
        """Keep which root a compiled plain function leads to: its trace does not show it."""
        if isinstance(call.call.function, FunctionType):
            self._roots[call.call.function] = weakref.ref(call.root)

    def current_call(self) -> RootCall | None:
        """`find_root`, or the root that the compiled plain function on the stack led to before."""
        found, call = find_root(), compile_call()
        if found is not None or call is None or not isinstance(call.function, FunctionType):
            return found
        known = self._roots.get(call.function)
        root = known() if known is not None else None
        return RootCall(root, call.args, call.kwargs, call) if root is not None else None

    def forget(self) -> None:
        """Drop all states; models keep what is installed on them."""
        self._states.clear()
        self._roots.clear()


def find_root() -> RootCall | None:
    """The module behind the outermost `torch.compile` call on the stack, None outside of one.

    For a compiled plain function it is the outermost module being called, if there is one yet.
    """
    call = compile_call()
    if call is None:
        return None
    owner = next((f.__self__ for f in _chain(call.function) if isinstance(f, MethodType)), None)
    if isinstance(owner, nn.Module):
        return RootCall(owner, call.args, call.kwargs, call)
    found = outermost_module(call)
    return RootCall(*found, call) if found is not None else None


def entry_codes(call: RootCall) -> frozenset[CodeType]:
    """Code objects in which Dynamo may have entered, or given up on, the root."""
    starts = [call.call.function, vars(call.root).get("forward"), type(call.root).forward]
    functions = [f for start in starts if start is not None for f in _chain(start)]
    codes = {f.__code__ for f in functions if isinstance(f, FunctionType)}
    return frozenset(code for code in codes if code.co_filename != _MODULE_FILE)


def is_of_root(code: CodeType, call: RootCall) -> bool:
    """Whether a traced frame is the root's own, or goes on with it behind a graph break.

    A frame of a submodule is neither, even where that submodule has every dispatch of the model.
    """
    codes = entry_codes(call)
    return code in codes or any(_resumes(code, entry) for entry in codes)


def _resumes(code: CodeType, entry: CodeType) -> bool:
    """Dynamo names the rest of a function after it and the line it goes on at."""
    found = re.fullmatch(
        rf"torch_dynamo_resume_in_{re.escape(entry.co_name)}_at_(\d+)", code.co_name
    )
    if found is None or code.co_filename != entry.co_filename:
        return False
    lines = [line for *_, line in entry.co_lines() if line is not None]
    return entry.co_firstlineno <= int(found[1]) <= max(lines, default=0)


def _chain(function: Any) -> list[Any]:
    """`function` and everything it wraps: bound methods, partials, decorators."""
    found: list[Any] = []
    current = function
    while current is not None and all(current is not seen for seen in found):
        found.append(current)
        if isinstance(current, MethodType):
            current = current.__func__
        elif isinstance(current, functools.partial):
            current = current.func
        else:
            current = inspect.getattr_static(current, "__wrapped__", None)
    return found
