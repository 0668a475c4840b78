"""Analysing a model the first time a fragment of it runs, so that its next call is one graph.

    call 1    fragments; the first one to run: find the root, install, note to lift Dynamo's marks
    end of 1  marks lifted: Dynamo will trace the root's forward again
    call 2    one graph -> captured; still broken -> everything undone, reason kept
    call 3..  nothing compiles

Marks are never lifted while anything is being compiled: that kills the process.
"""

from __future__ import annotations

import enum
import functools
import inspect
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from moeca_compile.capture.activity import compiling_for_moeca
from moeca_compile.capture.banks import find_banks
from moeca_compile.capture.install import install, is_installed, uninstall
from moeca_compile.capture.report import CaptureReport
from moeca_compile.torch_compat import (
    CompileCall,
    compile_call,
    on_call_end,
    reset_code,
    traced_frame,
)

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
    CAPTURED = "captured as one graph"
    REFUSED = "left in fragments"


@dataclass
class RootState:
    """What is known of one root; graphs are counted as backend calls."""

    phase: Phase = Phase.NEW
    report: CaptureReport | None = None
    reason: str = ""
    graphs_before: int = 0
    graphs_after: int = 0


@dataclass
class RootRegistry:
    """States by root module, held weakly. is_active: see `install`."""

    is_active: Callable[[], bool] = compiling_for_moeca
    _states: weakref.WeakKeyDictionary[nn.Module, RootState] = field(
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

    def forget(self) -> None:
        """Drop all states; models keep what is installed on them."""
        self._states.clear()


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
    found: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not call.frame:
        if frame.f_code.co_filename == _MODULE_FILE and frame.f_code.co_name == "_call_impl":
            found = frame
        frame = frame.f_back
    if found is None:
        return None
    values = found.f_locals
    return RootCall(values["self"], values["args"], values["kwargs"], call)


def prepare(model: nn.Module, *args: Any, **kwargs: Any) -> CaptureReport:
    """Capture ahead of the first compiled call, as `fullgraph=True` needs.

    Runs `model(*args, **kwargs)` once, eagerly. Returns what was replaced and what was refused.
    """
    root = getattr(model, "_orig_mod", model)
    return install(root, args, kwargs, is_active=compiling_for_moeca)


def wrap_fragment(compiled: Callable[..., Any], registry: RootRegistry) -> Callable[..., Any]:
    """To be called by the backend on what it is about to return, once per graph.

    Returns `compiled` itself unless the graph is a fragment of a root that is still to be analysed.
    """
    call = find_root()
    if call is None:
        return compiled
    state = registry.state(call.root)
    if state.phase in (Phase.CAPTURED, Phase.REFUSED):
        return compiled
    frame = traced_frame()
    whole = frame is not None and not frame.breaks and frame.code in entry_codes(call)
    if state.phase is Phase.NEW and is_installed(call.root):
        state.phase = Phase.WAITING
    if state.phase is Phase.NEW:
        state.graphs_before += 1
        if whole or not find_banks(call.root):
            return compiled
        return FragmentTrigger(registry, call.root).wrap(compiled)
    if state.phase is Phase.INSTALLED:
        state.graphs_before += 1
    elif whole:
        state.graphs_after += 1
        state.phase = Phase.CAPTURED
    elif _capturable(call.root):
        state.graphs_after += 1
        state.reason = state.reason or _why(frame.reason if frame else "")
        return _undo_after(call, state, compiled)
    return compiled


@dataclass
class FragmentTrigger:
    """Runs the analysis of one root when the first of its fragments runs."""

    registry: RootRegistry
    root: nn.Module

    def __post_init__(self) -> None:
        self._root = weakref.ref(self.root)
        del self.root  # compiled fragments outlive models: they must not keep one alive

    def wrap(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled`, preceded by the analysis as long as that is due."""
        pending = [self]

        @functools.wraps(compiled, assigned=(), updated=())
        def fragment(*args: Any) -> Any:
            if pending and pending[0].fire():
                pending.clear()
            return compiled(*args)

        return fragment

    def fire(self) -> bool:
        """Analyse if it is time to; True when this trigger is spent."""
        root, call = self._root(), find_root()
        if root is None:
            return True
        state = self.registry.state(root)
        if state.phase is not Phase.NEW:
            return True
        if call is None or call.root is not root or not _capturable(root):
            return False
        _analyse(call, state, self.registry.is_active)
        return True


def entry_codes(call: RootCall) -> frozenset[CodeType]:
    """Code objects in which Dynamo may have entered, or given up on, the root."""
    starts = [call.call.function, vars(call.root).get("forward"), type(call.root).forward]
    functions = [f for start in starts if start is not None for f in _chain(start)]
    codes = {f.__code__ for f in functions if isinstance(f, FunctionType)}
    return frozenset(code for code in codes if code.co_filename != _MODULE_FILE)


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


def _capturable(root: nn.Module) -> bool:
    """Whether the replacements would act now: no gradients, nothing in training mode."""
    return not torch.is_grad_enabled() and not root.training


def _analyse(call: RootCall, state: RootState, is_active: Callable[[], bool]) -> None:
    state.phase = Phase.REFUSED  # holds while the analysis runs, and if it fails
    try:
        state.report = install(call.root, call.args, call.kwargs, is_active=is_active)
    except Exception as error:  # the model is the user's: whatever it raises, it stays as it is
        uninstall(call.root)
        state.reason = f"the analysis failed: {type(error).__name__}: {error}"
        return
    if not state.report.installed:
        state.reason = "no dispatch could be replaced"
        return
    state.phase = Phase.INSTALLED
    codes = entry_codes(call)

    def lift() -> None:
        for code in codes:
            reset_code(code)
        state.phase = Phase.WAITING

    if not on_call_end(call.call, lift):
        lift()


def _undo_after(
    call: RootCall, state: RootState, compiled: Callable[..., Any]
) -> Callable[..., Any]:
    root, codes = weakref.ref(call.root), entry_codes(call)

    def undo() -> None:
        if state.phase is not Phase.WAITING or (owner := root()) is None:
            return
        state.phase = Phase.REFUSED
        uninstall(owner)
        for code in codes:
            reset_code(code)

    if on_call_end(call.call, undo):
        return compiled

    def fragment(*args: Any) -> Any:
        undo()
        return compiled(*args)

    return fragment


def _why(reason: str) -> str:
    return f"still broken after capture: {reason or 'Dynamo gave up on the outermost frame'}"
