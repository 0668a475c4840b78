"""Putting recognised dispatches in place, on instances, and taking them out again.

    module.moe_infer = override      acts only while Dynamo traces for this backend, in eval mode
                                     and without gradients; otherwise it calls the original

The override is a bound method: deepcopy rebinds it to the copy, and pickling looks its name up on
the class, so a saved and loaded model has its original method back.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import nn

from .analyse import Findings, analyse
from .method import Method
from .method_level import Found
from .own_code import own_forward
from .report import FLAGS, NONE, CaptureReport, ModuleCapture
from .sandbox import undisturbed
from .whole import whole_trace_failure

_RECORD = "_moeca_capture"
_OWN_CODE = "_moeca_own_code"
_SYMBOLS = "_moeca_symbols"


@dataclass(frozen=True)
class _Installed:
    """What an override replaced: a class attribute, or an instance attribute to put back."""

    original: Callable[..., Any]
    on_instance: bool
    is_dispatch: bool


def install(
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    is_active: Callable[[], bool],
) -> CaptureReport:
    """Find the dispatches of `root` that can be made traceable and replace them on their instances.

    Runs `root(*args, **kwargs)` once more, eagerly; random state and what the forward stores on
    modules are restored. is_active: asked while Dynamo traces; its answer becomes a constant.
    Raises what the forward raises; then nothing is installed.
    """
    started = time.perf_counter()
    uninstall(root)
    eagerly = functools.partial(analyse, root, args, kwargs)
    disabled = cast(Callable[[], Findings], torch.compiler.disable(eagerly))
    with torch.compiler.set_stance("force_eager"), undisturbed(root):
        findings = disabled()
    outcomes = (*findings.dispatches, *findings.others)
    try:
        for outcome in outcomes:
            if outcome.method is not None and outcome.found is not None:
                _put(outcome.method, outcome.found, is_active)
        others = [o.capture for o in findings.others]
        others += _keep_in_graph(root, args, kwargs, findings, is_active)
        if is_installed(root):
            _own_forward(root, is_active)
    except BaseException:
        uninstall(root)
        raise
    modules = tuple(outcome.capture for outcome in findings.dispatches)
    elapsed = (time.perf_counter() - started) * 1000
    return CaptureReport(modules, elapsed, tuple(others))


def uninstall(root: nn.Module) -> None:
    """Put every replaced method of `root` and its submodules back."""
    for module in root.modules():
        for name, value in list(vars(module).items()):
            if getattr(getattr(value, "__func__", None), _OWN_CODE, False):
                del vars(module)[name]
            record = getattr(getattr(value, "__func__", None), _RECORD, None)
            if not isinstance(record, _Installed):
                continue
            if record.on_instance:
                vars(module)[name] = MethodType(record.original, module)
            else:
                del vars(module)[name]


def is_installed(root: nn.Module) -> bool:
    """Whether any method of `root` or its submodules is replaced at present."""
    forward = getattr(vars(root).get("forward"), "__func__", None)
    return bool(_records(root)) or hasattr(forward, _OWN_CODE)


def count_installed(root: nn.Module) -> int:
    """How many dispatches of `root` and its submodules are replaced at present."""
    return sum(record.is_dispatch for record in _records(root))


def keeps_host_reads(root: nn.Module | None) -> bool:
    """Whether the graph of `root` may hold sizes known at run time only; see whole.py."""
    forward = getattr(vars(root).get("forward"), "__func__", None) if root is not None else None
    return bool(getattr(forward, _SYMBOLS, False))


def _records(root: nn.Module) -> list[_Installed]:
    functions = (
        getattr(value, "__func__", None)
        for module in root.modules()
        for value in vars(module).values()
        if isinstance(value, MethodType)
    )
    return [
        vars(f)[_RECORD] for f in functions if isinstance(f, FunctionType) and _RECORD in vars(f)
    ]


def _own_forward(root: nn.Module, is_active: Callable[[], bool], *, symbols: bool = False) -> None:
    """Give the root a forward of its own, in which this backend finds no other one's marks."""
    declared = type(root).forward
    if "forward" in vars(root) or not isinstance(declared, FunctionType):
        return
    ours = _compiling(is_active)
    own = own_forward(declared, ours, _acting(ours) if symbols else None)
    vars(own)[_OWN_CODE] = True
    if symbols:
        vars(own)[_SYMBOLS] = True
    vars(root)["forward"] = MethodType(own, root)


def _keep_in_graph(
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    findings: Findings,
    is_active: Callable[[], bool],
) -> list[ModuleCapture]:
    """Where host reads remain, have Dynamo keep them in the graph if the root then gives one.

    Reads behind the last expert are kept only if they give numbers that depend on no input: other
    ones would make sizes of the graph unknown, and the part before them is whole anyway.
    """
    reads = findings.remaining or findings.behind
    if not reads or not (findings.remaining or is_installed(root)):
        return []
    place = reads[0].place
    reason = f"{len(reads)} reads of the host kept in the graph"
    if "forward" in vars(root) or not isinstance(type(root).forward, FunctionType):
        failed = "the model's forward is replaced on the instance"
    else:
        _own_forward(root, is_active, symbols=True)
        with undisturbed(root):
            constant = not findings.remaining
            failed = whole_trace_failure(root, args, kwargs, findings.result, constant)
        if failed:
            del vars(root)["forward"]
    text = f"reads the host, and no whole graph: {failed}" if failed else reason
    mechanism = NONE if failed else FLAGS
    return [ModuleCapture("", 0, mechanism, not failed, text, place.location)]


def _put(method: Method, found: Found, is_active: Callable[[], bool]) -> None:
    override = _make_override(method.declared, found.replacement, is_active)
    override.__name__ = method.function.__name__
    override.__qualname__ = method.function.__qualname__
    override.__doc__ = method.function.__doc__
    override.__module__ = method.function.__module__
    # its own code object: Dynamo caches by code, and instances must not compete for one cache
    override.__code__ = override.__code__.replace(co_name=method.function.__name__)
    record = _Installed(method.declared, method.on_instance, found.plan is not None)
    vars(override).update({"__wrapped__": method.declared, _RECORD: record})
    vars(method.module)[method.attribute] = MethodType(override, method.module)


def _make_override(
    original: Callable[..., Any], replacement: Callable[..., Any], is_active: Callable[[], bool]
) -> FunctionType:
    acts = _acting(_compiling(is_active))

    def override(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (replacement if acts(self) else original)(self, *args, **kwargs)

    return override  # type: ignore[return-value]


def _compiling(is_active: Callable[[], bool]) -> Callable[[], bool]:
    """Whether Dynamo is tracing for this backend."""

    @torch.compiler.assume_constant_result
    def active() -> bool:
        return bool(is_active())

    def compiling() -> bool:
        return torch.compiler.is_compiling() and active()

    return compiling


def _acting(compiling: Callable[[], bool]) -> Callable[[nn.Module], bool]:
    """Whether a replacement acts on a module: traced for this backend, without gradients."""

    def acts(module: nn.Module) -> bool:
        return compiling() and not module.training and not torch.is_grad_enabled()

    return acts
