"""Analysing a model the first time a fragment of it runs, so that its next call is one graph.

    call 1    the first fragment to run: find the root, install, note to lift Dynamo's marks; the
              rest of the call runs as it is
    end of 1  marks lifted: Dynamo will trace the root's forward again
    call 2    all dispatches in one graph -> captured; still broken at its end -> everything undone
    call 3..  nothing compiles

Marks are never lifted while anything is being compiled: that kills the process.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..torch_compat import (
    TracedFrame,
    compiled_root,
    on_call_end,
    reset_code,
    trace_no_more,
    traced_frame,
)
from .activity import compiling_for_moeca
from .install import count_installed, install, is_installed, uninstall
from .report import CaptureReport
from .roots import Phase, RootCall, RootRegistry, RootState, entry_codes, find_root, is_of_root
from .stacked import may_dispatch

__all__ = ["FragmentTrigger", "RootCall", "find_root", "prepare", "wrap_fragment"]


def prepare(model: nn.Module, *args: Any, **kwargs: Any) -> CaptureReport:
    """Capture ahead of the first compiled call, as `fullgraph=True` needs.

    Runs `model(*args, **kwargs)` once, eagerly. Returns what was replaced and what was refused.
    """
    root = compiled_root(model) or model
    return install(root, args, kwargs, is_active=compiling_for_moeca)


def wrap_fragment(compiled: Callable[..., Any], registry: RootRegistry) -> Callable[..., Any]:
    """To be called by the backend on what it is about to return, once per graph.

    Returns `compiled` itself unless the graph is a fragment of a root that is still to be analysed
    or judged.
    """
    call = registry.current_call()
    if call is None:
        return compiled
    root, state, frame = call.root, registry.state(call.root), traced_frame()
    if state.phase in (Phase.CAPTURED, Phase.REFUSED):
        return compiled
    if state.phase is Phase.NEW and is_installed(root):
        state.phase = Phase.WAITING
    entered = frame is not None and frame.code in entry_codes(call)
    breaks = frame.reason if frame is not None and frame.breaks else ""
    whole = entered and not breaks
    if state.phase is Phase.WAITING:
        state.graphs_after += 1
        of_root = frame is not None and is_of_root(frame.code, call)
        if acts_now(call, state) and (whole or (of_root and holds_all_dispatches(frame, root))):
            state.phase = Phase.CAPTURED
            split = breaks or (state.reason if not entered else "")
            state.reason = f"the rest of the model is split: {split}" if split else ""
            return compiled
    else:
        state.graphs_before += 1
    if whole or not may_dispatch(root):
        return compiled
    if state.phase is not Phase.NEW and breaks:
        state.reason = breaks  # broke although the dispatches were replaced
    return FragmentTrigger(registry, root).wrap(compiled)


def holds_all_dispatches(frame: TracedFrame | None, root: nn.Module) -> bool:
    """Whether one graph has every captured dispatch, so that a break elsewhere does no harm."""
    return count_dispatches(frame) >= count_installed(root) > 0


def count_dispatches(frame: TracedFrame | None) -> int:
    """How many captured dispatches the graph being compiled holds."""
    nodes = frame.graph.nodes if frame is not None else ()
    return sum("moeca.select_experts" in str(n.target) for n in nodes)


class FragmentTrigger:
    """Moves the capture of one root on whenever one of its fragments runs."""

    def __init__(self, registry: RootRegistry, root: nn.Module) -> None:
        self._registry = registry
        self._root = weakref.ref(root)  # compiled fragments outlive models: keep none alive

    def wrap(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled`, preceded by `fire` until the root is settled."""
        pending = [self]

        def fragment(*args: Any) -> Any:
            if pending and pending[0].fire():
                pending.clear()
            return compiled(*args)

        return fragment

    def fire(self) -> bool:
        """Analyse or judge if it is time to; True when the root is settled."""
        root = self._root()
        state = self._registry.find(root) if root is not None else None
        if state is None or state.phase in (Phase.CAPTURED, Phase.REFUSED):
            return True
        call = self._registry.current_call()
        if call is None or call.root is not root or not acts_now(call, state):
            return False
        if state.phase is Phase.NEW:
            _analyse(call, state, self._registry)
        elif state.phase is Phase.WAITING:
            _judge_at_end(call, state)
        return False


def acts_now(call: RootCall, state: RootState) -> bool:
    """Whether replacements act in the call at hand: no gradients, not in training mode.

    The first fragment to ask decides for the whole call: a later one may sit inside a `no_grad`
    method of a model that is called with gradients.
    """
    if not state.postponed and (torch.is_grad_enabled() or call.root.training):

        def resume() -> None:
            state.postponed = False

        state.postponed = on_call_end(call.call, resume)
        return False
    return not state.postponed


def _analyse(call: RootCall, state: RootState, registry: RootRegistry) -> None:
    state.phase = Phase.REFUSED  # holds while the analysis runs, and if it fails
    try:
        state.report = install(call.root, call.args, call.kwargs, is_active=registry.is_active)
    except Exception as error:  # the model is the user's: whatever it raises, it stays as it is
        uninstall(call.root)
        state.reason = f"the analysis failed: {type(error).__name__}: {error}"
        return
    if not state.report.changed:
        state.reason = "no dispatch could be replaced"
        return
    state.phase = Phase.INSTALLED
    trace_no_more(call.call)  # the next call traces all of it
    registry.remember(call)
    codes = entry_codes(call)

    def lift() -> None:
        for code in codes:
            reset_code(code)
        state.phase = Phase.WAITING

    if not on_call_end(call.call, lift):
        lift()


def _judge_at_end(call: RootCall, state: RootState) -> None:
    """A fragment runs after capture: unless the root was traced whole by then, undo."""
    if state.judging:
        return
    root, codes = weakref.ref(call.root), entry_codes(call)

    def judge() -> None:
        state.judging = False
        owner = root()
        if state.phase is not Phase.WAITING or owner is None:
            return
        why = state.reason or "Dynamo gave up on the outermost frame"
        state.phase, state.reason = Phase.REFUSED, f"still broken after capture: {why}"
        uninstall(owner)
        for code in codes:
            reset_code(code)

    state.judging = True
    if not on_call_end(call.call, judge):
        judge()
