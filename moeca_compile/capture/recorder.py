"""What a bank's experts were called on and returned, recorded while an owner is replayed.

with record_modules(bank) as record:          experts that are modules: their hooks
with record_slices(holder) as record:         slices of parameters: every call of torch
    record.begin(); method(..); record.end()  the first call of the method counts
record.evidences(owner, path)                 one, or one per body that the slices may have
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from .banks import experts_of
from .expert_call import ExpertCall
from .expert_template import ExpertTemplate, Learned, learn, learn_same
from .op_record import OpRecord
from .propose import Evidence
from .sandbox import copy_arguments
from .stacked import stacked_parameters


class ExpertRecord(Protocol):
    """See the module's docstring."""

    def begin(self) -> None:
        """The first call of the method begins."""
        ...

    def end(self) -> None:
        """It is over."""
        ...

    def evidences(self, owner: nn.Module, path: tuple[str, ...]) -> Iterator[Evidence]:
        """Calls of the experts; path: from the owner to the bank. Likeliest first."""
        ...


class ModuleRecord:
    """Calls of modules, with copies of what they were called on and returned."""

    def __init__(self, container: nn.Module) -> None:
        self.calls: list[ExpertCall] = []
        self._size = len(experts_of(container))
        self._last: int | None = None

    def begin(self) -> None:
        """Calls of experts are recorded anyway."""

    def end(self) -> None:
        self._last = len(self.calls)

    def evidences(self, owner: nn.Module, path: tuple[str, ...]) -> Iterator[Evidence]:
        yield Evidence(owner, path, self._size, tuple(self.calls[: self._last]))


class SliceRecord:
    """Calls of torch around slices of the stacked parameters of `holder`."""

    def __init__(self, holder: nn.Module) -> None:
        self.holder, self.ops = holder, OpRecord()
        self.stacks: dict[str, Tensor] = stacked_parameters(holder)
        self._over = False

    def begin(self) -> None:
        self.ops.on = not self._over

    def end(self) -> None:
        self.ops.on, self._over = False, True

    def evidences(self, owner: nn.Module, path: tuple[str, ...]) -> Iterator[Evidence]:
        size = next(iter(self.stacks.values())).shape[0]
        for learned in learn(self.ops.ops, self.holder, self.stacks, size):
            yield Evidence(owner, path, size, learned.calls, learned.template)

    def same_body(self, template: ExpertTemplate) -> Learned | None:
        """The body of another record, in the dtypes of this one."""
        return learn_same(self.ops.ops, self.holder, self.stacks, template)


@contextlib.contextmanager
def record_slices(holder: nn.Module) -> Iterator[SliceRecord]:
    """Record calls of torch between `begin` and `end`."""
    record = SliceRecord(holder)
    with record.ops:
        yield record


@contextlib.contextmanager
def record_modules(container: nn.Module) -> Iterator[ModuleRecord]:
    """Record the calls of the experts in `container`.

    Outputs are copied before the caller can change them in place.
    """
    record = ModuleRecord(container)
    waiting: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        waiting.append((copy_arguments(args), copy_arguments(kwargs)))

    def after(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, ___: Any, output: Any) -> None:
            args, kwargs = waiting.pop()
            record.calls.append(ExpertCall(index, args, kwargs, copy_arguments(output)))

        return hook

    handles: list[Any] = []
    for index, expert in enumerate(experts_of(container)):
        handles.append(expert.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(expert.register_forward_hook(after(index), with_kwargs=True))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
