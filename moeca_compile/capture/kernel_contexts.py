"""The old way to choose attention kernels, which Dynamo cannot trace, as the new one.

    with torch.backends.cuda.sdp_kernel(enable_flash=True, ..):   =>   with sdpa_kernel([..]):

torch implements the first by the second, so nothing has to be tried.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .function_source import HELPER_PREFIX, build, parse
from .method import Method, find_method
from .method_level import Found
from .statements import kept_lines

_KERNELS = f"{HELPER_PREFIX}kernels"
_OLD_NAME = "sdp_kernel"


def chosen_kernels(
    enable_flash: bool = True,
    enable_math: bool = True,
    enable_mem_efficient: bool = True,
    enable_cudnn: bool = True,
) -> Any:
    """The context of the new interface for the arguments of the old one."""
    backends = []
    if enable_flash:
        backends.append(SDPBackend.FLASH_ATTENTION)
    if enable_mem_efficient:
        backends.append(SDPBackend.EFFICIENT_ATTENTION)
    if enable_math:
        backends.append(SDPBackend.MATH)
    if enable_cudnn:
        backends.append(SDPBackend.CUDNN_ATTENTION)
    return sdpa_kernel(backends)


def old_contexts(root: nn.Module) -> Iterator[tuple[Method, Found | None, str]]:
    """Methods below `root` that enter the old context, each with its replacement or a reason."""
    for path, module in root.named_modules():
        for function in _functions_naming_it(module):
            method = find_method(module, path, function.__code__)
            if method is not None:
                yield (method, *_replaced(method))


def _functions_naming_it(module: nn.Module) -> list[FunctionType]:
    found: dict[str, object] = {}
    for cls in type(module).__mro__:
        if cls is nn.Module:
            break
        for name, value in vars(cls).items():
            found.setdefault(name, getattr(value, "__wrapped__", value))
    functions = [value for value in found.values() if isinstance(value, FunctionType)]
    return [f for f in functions if _OLD_NAME in f.__code__.co_names]


def _replaced(method: Method) -> tuple[Found | None, str]:
    if method.obstacle:
        return None, method.obstacle
    try:
        definition = parse(method.plain)
    except ValueError as error:
        return None, str(error)
    blocks = [node for node in ast.walk(definition) if isinstance(node, ast.With)]
    entered = [item.context_expr for block in blocks for item in block.items]
    calls = [e for e in entered if isinstance(e, ast.Call) and _is_old(e, method.plain)]
    if not calls:
        return None, "no `with` statement enters the context"
    for call in calls:
        call.func = ast.copy_location(ast.Name(_KERNELS, ast.Load()), call)
    replacement = build(definition, method.plain, {_KERNELS: chosen_kernels})
    return Found(replacement, None, kept_lines(definition)), "kernels chosen by sdpa_kernel"


def _is_old(call: ast.Call, function: FunctionType) -> bool:
    parts: list[str] = []
    named: ast.expr = call.func
    while isinstance(named, ast.Attribute):
        parts.append(named.attr)
        named = named.value
    if not isinstance(named, ast.Name):
        return False
    value: Any = function.__globals__.get(named.id)
    for part in reversed(parts):
        value = getattr(value, part, None)
    return value is torch.backends.cuda.sdp_kernel
