"""Putting recognised dispatches in place, on instances, and taking them out again.

    module.moe_infer = override      acts only while Dynamo traces for this backend, in eval mode
                                     and without gradients; otherwise it calls the original

The override is a bound method: deepcopy rebinds it to the copy, and pickling looks its name up on
the class, so a saved and loaded model has its original method back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from moeca_compile.capture.method_level import Found, Refused, capture_method
from moeca_compile.capture.observe import Method, Observation, Site, observe
from moeca_compile.capture.report import METHOD, NONE, STATEMENTS, CaptureReport, ModuleCapture
from moeca_compile.capture.sandbox import undisturbed
from moeca_compile.capture.statement_level import capture_statements
from moeca_compile.capture.subject import Subject

_RECORD = "_moeca_capture"


@dataclass(frozen=True)
class _Installed:
    """What an override replaced: a class attribute, or an instance attribute to put back."""

    original: Callable[..., Any]
    on_instance: bool


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
    disabled = torch.compiler.disable(_analyse, reason="capture analysis runs eagerly")
    with torch.compiler.set_stance("force_eager"), undisturbed(root):
        outcomes = disabled(root, args, kwargs)
    try:
        for _, method, found in outcomes:
            if method is not None and isinstance(found, Found):
                _put(method, found.replacement, is_active)
    except BaseException:
        uninstall(root)
        raise
    modules = tuple(capture for capture, _, _ in outcomes)
    return CaptureReport(modules, (time.perf_counter() - started) * 1000)


def uninstall(root: nn.Module) -> None:
    """Put every replaced method of `root` and its submodules back."""
    for module in root.modules():
        for name, value in list(vars(module).items()):
            record = getattr(getattr(value, "__func__", None), _RECORD, None)
            if not isinstance(record, _Installed):
                continue
            if record.on_instance:
                vars(module)[name] = MethodType(record.original, module)
            else:
                del vars(module)[name]


def is_installed(root: nn.Module) -> bool:
    """Whether any method of `root` or its submodules is replaced at present."""
    return any(
        hasattr(getattr(value, "__func__", None), _RECORD)
        for module in root.modules()
        for value in vars(module).values()
        if isinstance(value, MethodType)
    )


_Outcome = tuple[ModuleCapture, Method | None, Found | Refused]


def _analyse(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[_Outcome]:
    observation = observe(root, args, kwargs)
    return [
        _analyse_site(site, observation)
        for site in observation.sites
        if site.routed or site.uneven or (site.bank.difference and site.integers)
    ]


def _analyse_site(site: Site, observation: Observation) -> _Outcome:
    refusal = _refusal(site)
    if refusal:
        return _refused(site, refusal)
    reasons: list[str] = []
    for method in site.callers:
        recorded = observation.arguments.get(id(method.module))
        if recorded is None:
            reasons.append(f"{method.attribute}: no recorded arguments of its module")
            continue
        if not _only_turns_gradients_off(method):
            reasons.append(f"{method.attribute}: decorated, and the decorator may matter")
            continue
        try:
            subject = Subject(site, method, _relative(site.bank.path, method.path), recorded)
            for mechanism, capture in ((METHOD, capture_method), (STATEMENTS, capture_statements)):
                outcome = capture(subject)
                if isinstance(outcome, Found):
                    return _accepted(site, method, mechanism, outcome)
                reasons.append(f"{method.attribute} ({mechanism}): {outcome.reason}")
        except Exception as error:  # user code runs here: any failure means "leave it as it is"
            reasons.append(f"{method.attribute}: {type(error).__name__}: {error}")
    return _refused(site, "; ".join(reasons))


def _refusal(site: Site) -> str:
    if site.bank.difference:
        return site.bank.difference
    if any(method.module.training for method in site.callers):
        return "the module is in training mode"
    if not site.routed:
        return "no integer tensor in sight says which rows each expert received"
    return ""


def _accepted(site: Site, method: Method, mechanism: str, found: Found) -> _Outcome:
    reason = f"reproduced with {found.plan.slots} slots per token"
    experts = len(site.bank.experts)
    capture = ModuleCapture(method.path, experts, mechanism, True, reason, site.location)
    return capture, method, found


def _refused(site: Site, reason: str) -> _Outcome:
    path = site.callers[0].path
    capture = ModuleCapture(path, len(site.bank.experts), NONE, False, reason, site.location)
    return capture, None, Refused(reason)


def _relative(path: str, owner: str) -> tuple[str, ...]:
    below = path[len(owner) :].strip(".")
    return tuple(below.split(".")) if below else ()


def _only_turns_gradients_off(method: Method) -> bool:
    """Whether the wrappers around the function, if any, only switch gradient recording."""
    current: Any = method.declared
    while current is not method.function:
        cells = getattr(current, "__closure__", None) or ()
        factories = [getattr(cell.cell_contents, "__self__", None) for cell in cells]
        grad_modes = (torch.no_grad, torch.inference_mode, torch.set_grad_enabled)
        if not any(isinstance(factory, grad_modes) for factory in factories):
            return False
        current = current.__wrapped__
    return True


def _put(method: Method, replacement: Callable[..., Any], is_active: Callable[[], bool]) -> None:
    override = _make_override(method.declared, replacement, is_active)
    override.__name__ = method.function.__name__
    override.__qualname__ = method.function.__qualname__
    override.__doc__ = method.function.__doc__
    override.__module__ = method.function.__module__
    # its own code object: Dynamo caches by code, and instances must not compete for one cache
    override.__code__ = override.__code__.replace(co_name=method.function.__name__)
    setattr(override, "__wrapped__", method.declared)
    setattr(override, _RECORD, _Installed(method.declared, method.on_instance))
    vars(method.module)[method.attribute] = MethodType(override, method.module)


def _make_override(
    original: Callable[..., Any], replacement: Callable[..., Any], is_active: Callable[[], bool]
) -> FunctionType:
    @torch.compiler.assume_constant_result
    def active() -> bool:
        return bool(is_active())

    def override(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and active():
            if not self.training and not torch.is_grad_enabled():
                return replacement(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    return override  # type: ignore[return-value]
