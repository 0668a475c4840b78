"""Copies of every call of a bank's experts, made while an owner is replayed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .banks import experts_of
from .propose import ExpertCall
from .sandbox import copy_arguments


@contextlib.contextmanager
def record_experts(container: nn.Module) -> Iterator[list[ExpertCall]]:
    """Collect the calls of the experts in `container`; the list is complete on exit.

    Outputs are copied before the caller can change them in place.
    """
    calls: list[ExpertCall] = []
    waiting: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        waiting.append((copy_arguments(args), copy_arguments(kwargs)))

    def after(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, ___: Any, output: Any) -> None:
            args, kwargs = waiting.pop()
            calls.append(ExpertCall(index, args, kwargs, copy_arguments(output)))

        return hook

    handles: list[Any] = []
    for index, expert in enumerate(experts_of(container)):
        handles.append(expert.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(expert.register_forward_hook(after(index), with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
