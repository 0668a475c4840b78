"""What runs and what is said where nothing can be cached: plain Inductor, one line, `strict`."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from .capture.install import keeps_host_reads
from .capture.stacked import may_dispatch
from .errors import UnsupportedError
from .options import Options
from .pipeline import Analysis
from .reasons import NAME_ONE, NO_LAYER, first_line, why_refused, wrong_mode
from .request import RECAPTURE, Request, refused_state, state_with_refusals
from .runtime.registry import REGISTRY
from .torch_compat import compiles_kernels, inductor_fallback, traced_frame

log = logging.getLogger(__name__)
TOLD: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def run_plain(gm: GraphModule, inputs: Sequence[Any], request: Request) -> Callable[..., Any]:
    """Plain Inductor. A graph with sizes known at run time only, which capture asked for, runs as
    it is where Inductor cannot compile it."""
    try:
        return inductor_fallback(gm, list(inputs), request.config)
    except Exception as error:
        if not keeps_host_reads(request.root):
            raise
        log.warning("not compiled, the graph runs as it is: %s", first_line(error))
        return gm.forward


def inductor_later(gm: GraphModule, request: Request) -> Callable[..., Any]:
    """Plain Inductor for a graph whose own backend call is over."""
    if not compiles_kernels():
        return gm.forward
    return torch.compile(gm, backend="inductor", options=request.config or None)


class Fragment:
    """A piece of a model that is about to be captured whole: run as it is, once.

    If the capture fails, or the piece turns out to lie beside the captured graph, it stays in use
    and Inductor compiles it at its next call.
    """

    def __init__(self, gm: GraphModule, request: Request):
        self._gm = gm
        self._request = request
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self._compiled is None:
            root = self._request.root
            if refused_state(root) is None and not RECAPTURE.runs_beside(root):
                return self._gm.forward(*args)
            report_plain(NO_LAYER, self._request)
            self._compiled = inductor_later(self._gm, self._request)
        return self._compiled(*args)


def report_refused(reason: str, request: Request) -> None:
    """Say that the policy will refresh at every step; with `strict=True` raise UnsupportedError."""
    options = request.options
    message = f"policy {options.policy!r}: the model's output cannot be forecast: {reason}"
    if options.strict:
        raise UnsupportedError(f"strict=True: {message}; choose another policy")
    log.warning(message)


def report_plain(reason: str, request: Request) -> None:
    """Say once per model and reason that plain Inductor runs; `strict=True`: UnsupportedError.

    A piece of a model that was captured elsewhere, or whose end is still to come, is none of the
    user's business.
    """
    root = request.root
    refused = refused_state(root)
    if reason == NO_LAYER and root is not None and may_dispatch(root):
        reason = wrong_mode(root) or reason  # the dispatch is captured in neither
    if reason == NO_LAYER and (state := state_with_refusals(root)) is not None:
        reason = why_refused(state)
    elif refused is not None:
        reason = why_refused(refused)
    elif reason == NO_LAYER and _has_more(root):
        log.debug("plain Inductor: %s", reason)
        return
    if reason == NO_LAYER and not request.options.policy_named:
        reason = f"{NO_LAYER}; {NAME_ONE}"
    if request.options.strict:
        raise UnsupportedError(f"strict=True: this graph cannot be cached: {reason}")
    told = TOLD.setdefault(root, set()) if root is not None else set()
    if reason not in told:
        log.warning("plain Inductor: %s", reason)
        told.add(reason)


def _has_more(root: nn.Module | None) -> bool:
    """Whether the graph at hand is a piece, and a cached layer is in or may be in another one."""
    frame = traced_frame()
    return (frame is not None and frame.breaks) or (root is not None and REGISTRY.holds(root))


def report_no_timestep(
    found: int | None, names: Sequence[str], analysis: Analysis, options: Options
) -> None:
    """Say that no step can be placed; with `strict=True` raise UnsupportedError. found: position of
    the timestep among the arguments; names: theirs."""
    if found is not None or options.interval == 1 or not analysis.plan.variants:
        return
    message = (
        f"no timestep among the tensor arguments {list(names)}: name it with "
        'options={"timestep": ...} or sample inside moeca_compile.generation(compiled); '
        "without either every step is a refresh"
    )
    if options.strict:
        raise UnsupportedError(f"strict=True: {message}")
    log.warning(message)
