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

from .analyse import Outcome, analyse
from .observe import Method
from .own_code import copy_function
from .report import CaptureReport
from .sandbox import undisturbed

_RECORD = "_moeca_capture"
_OWN_CODE = "_moeca_own_code"


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
    eagerly = functools.partial(analyse, root, args, kwargs)
    disabled = cast(Callable[[], tuple[Outcome, ...]], torch.compiler.disable(eagerly))
    with torch.compiler.set_stance("force_eager"), undisturbed(root):
        outcomes = disabled()
    try:
        for outcome in outcomes:
            if outcome.method is not None and outcome.found is not None:
                _put(outcome.method, outcome.found.replacement, is_active)
        if is_installed(root):
            _own_forward(root)
    except BaseException:
        uninstall(root)
        raise
    modules = tuple(outcome.capture for outcome in outcomes)
    return CaptureReport(modules, (time.perf_counter() - started) * 1000)


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
    return count_installed(root) > 0


def count_installed(root: nn.Module) -> int:
    """How many methods of `root` and its submodules are replaced at present."""
    return sum(
        hasattr(getattr(value, "__func__", None), _RECORD)
        for module in root.modules()
        for value in vars(module).values()
        if isinstance(value, MethodType)
    )


def _own_forward(root: nn.Module) -> None:
    """Give the root a forward that shares no code object with its class; see own_code.py."""
    declared = type(root).forward
    if "forward" in vars(root) or not isinstance(declared, FunctionType):
        return
    own = copy_function(declared)
    vars(own)[_OWN_CODE] = True
    vars(root)["forward"] = MethodType(own, root)


def _put(method: Method, replacement: Callable[..., Any], is_active: Callable[[], bool]) -> None:
    override = _make_override(method.declared, replacement, is_active)
    override.__name__ = method.function.__name__
    override.__qualname__ = method.function.__qualname__
    override.__doc__ = method.function.__doc__
    override.__module__ = method.function.__module__
    # its own code object: Dynamo caches by code, and instances must not compete for one cache
    override.__code__ = override.__code__.replace(co_name=method.function.__name__)
    record = _Installed(method.declared, method.on_instance)
    vars(override).update({"__wrapped__": method.declared, _RECORD: record})
    vars(method.module)[method.attribute] = MethodType(override, method.module)


def _make_override(
    original: Callable[..., Any], replacement: Callable[..., Any], is_active: Callable[[], bool]
) -> FunctionType:
    @torch.compiler.assume_constant_result
    def active() -> bool:
        return bool(is_active())

    def override(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        compiling_here = torch.compiler.is_compiling() and active()
        if compiling_here and not self.training and not torch.is_grad_enabled():
            return replacement(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    return override  # type: ignore[return-value]
