"""Where a model asks the host for values or sizes that depend on data: what breaks a trace.

    if mask.any(): ..            HostRead(at route.py:12 Router.forward)
    rows = x[torch.where(m)[0]]  HostRead(at route.py:13 Router.forward)

Found by running the model, from the tags torch gives its ops; no source is looked at.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_MASK_DTYPES = (torch.bool, torch.uint8)
_UNTAGGED = (Tensor.tolist, Tensor.numpy)
_LIBRARY = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parents[1])
_DEPTH = 12


@dataclass(frozen=True)
class Place:
    """A frame of the user's code. owner: the module that is its first argument, if it is one."""

    code: CodeType
    line: int
    owner: nn.Module | None

    @property
    def location(self) -> str:
        """File, line and function."""
        name = getattr(self.code, "co_qualname", self.code.co_name)  # since Python 3.11
        return f"{self.code.co_filename}:{self.line} {name}"


@dataclass(frozen=True)
class HostRead:
    """One such place, with its callers; order: when, on the clock of `HostReads`."""

    stack: tuple[Place, ...]
    order: int

    @property
    def place(self) -> Place:
        """The innermost frame."""
        return self.stack[0]


class HostReads:
    """Collects reads while the block of `watching` runs; a place counts once.

    clock: moved on by every read, and by `tick` for events that reads are to be compared with.
    """

    def __init__(self) -> None:
        self.reads: list[HostRead] = []
        self.clock = 0
        self._seen: set[tuple[CodeType, int, int]] = set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note every read of the block."""
        with _Functions(self._note), _Ops(self._note):
            yield

    def tick(self) -> int:
        """The time, moved on by one."""
        self.clock += 1
        return self.clock

    def _note(self) -> None:
        stack = _user_frames(sys._getframe(2))
        if not stack:
            return
        key = (stack[0].code, stack[0].line, id(stack[0].owner))
        if key not in self._seen:
            self._seen.add(key)
            self.reads.append(HostRead(stack, self.tick()))


class _Ops(TorchDispatchMode):
    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not _TAGS.isdisjoint(func.tags) and not _plain_index(func, args):
            self._note()
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _UNTAGGED:
            self._note()
        return func(*args, **(kwargs or {}))


def _plain_index(func: Any, args: tuple[Any, ...]) -> bool:
    """An index by integers: its size is that of the index."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return not any(isinstance(i, Tensor) and i.dtype in _MASK_DTYPES for i in args[1])


def _user_frames(frame: FrameType | None) -> tuple[Place, ...]:
    """Frames of the model, innermost first: outside of torch and this package.

    Ends where this package called the model: looking at the locals of a caller behind it would keep
    alive what the caller deletes (Python 3.11 and 3.12 hold on to a frame's `f_locals`).
    """
    found: list[Place] = []
    while frame is not None and len(found) < _DEPTH:
        file = frame.f_code.co_filename
        if found and file.startswith(_OWN):
            break
        if not file.startswith((_LIBRARY, _OWN, "<")):
            found.append(Place(frame.f_code, frame.f_lineno, _owner(frame)))
        frame = frame.f_back
    return tuple(found)


def _owner(frame: FrameType) -> nn.Module | None:
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return first if isinstance(first, nn.Module) else None
