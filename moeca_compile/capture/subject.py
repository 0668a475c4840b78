"""One module under analysis: its exact copy, its recorded arguments, and how to replay it."""

from __future__ import annotations

import ast
import copy
import functools
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..torch_compat import leaves
from .banks import Bank
from .method import Method
from .observe import Site
from .recorder import ExpertRecord, SliceRecord, record_modules, record_slices
from .replay import (
    close,
    exact_arguments,
    exact_copy,
    probe_arguments,
    tell_slices_apart,
)
from .sandbox import copy_arguments, exact_arithmetic

Replacement = Callable[..., Any]
Recorded = tuple[tuple[Any, ...], dict[str, Any]]  # args, kwargs


@dataclass
class Replay:
    """`method` of an owner, with a copy of the owner to experiment on.

    containers: the banks below the owner. whole: what `recorded` is a part of, if it is one, and
    what the owner was seen to return for that (None: not seen).
    copied: the owner's copy in float32 / float64; arguments: recorded (args, kwargs) of the
    owner, in the copy's dtypes.
    """

    method: Method
    recorded: Recorded
    containers: tuple[nn.Module, ...] = ()
    whole: tuple[Recorded, Any] | None = None

    def __post_init__(self) -> None:
        with exact_arithmetic(self.device):
            self.copied, self.moved = exact_copy(self.method.module, list(self.containers))
            self.arguments = exact_arguments(self.recorded)

    @property
    def is_exact(self) -> bool:
        """Whether the model's own dtypes are those of the copy."""
        module = self.method.module
        tensors = (*module.parameters(), *module.buffers(), *leaves(self.recorded)[0])
        floats = (t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point())
        return all(t.dtype in (torch.float32, torch.float64) for t in floats)

    @property
    def device(self) -> torch.device:
        """The device of the owner's parameters, of the recorded tensors where it has none."""
        tensors = itertools.chain(
            self.method.module.parameters(),
            (leaf for leaf in leaves(self.recorded)[0] if isinstance(leaf, torch.Tensor)),
        )
        return next((t.device for t in tensors), torch.device("cpu"))

    def replay(self, owner: nn.Module, arguments: Any, replacement: Replacement) -> Any:
        """Call `owner` with `replacement` (a plain function taking self) in place of the method."""
        name = self.method.attribute
        had, old = name in vars(owner), vars(owner).get(name)
        setattr(owner, name, MethodType(replacement, owner))
        args, kwargs = copy_arguments(arguments)
        try:
            return owner(*args, **kwargs)
        finally:
            if had:
                setattr(owner, name, old)
            else:
                delattr(owner, name)

    def exact(self, replacement: Replacement, arguments: Any = None) -> Any:
        """Replay the copy in exact arithmetic on `arguments` (default: the recorded ones)."""
        with exact_arithmetic(self.device):
            chosen = self.arguments if arguments is None else arguments
            return self.replay(self.copied, chosen, replacement)

    def native(self, replacement: Replacement) -> Any:
        """Replay in the model's own dtypes and autocast state, on a copy that shares weights."""
        with torch.no_grad():
            return self.replay(self._native_copy, self.recorded, replacement)

    @functools.cached_property
    def _native_copy(self) -> nn.Module:
        module = self.method.module
        return copy.deepcopy(module, {id(p): p for p in module.parameters()})

    def disagreement(self, replacement: Replacement) -> str:
        """Compare the whole owner before and after on every probe; "" or what differed."""
        probes = probe_arguments(self.arguments)
        differences = (self._differs(replacement, *probe) for probe in probes)
        return next(filter(None, differences), "") or self._whole_differs(replacement)

    def gives(self, replacement: Replacement, result: Any, arguments: Any = None) -> bool:
        """Whether the owner gives `result` on `arguments` (default: the recorded ones), where it
        computes in the copy's dtypes anyway. No says nothing: the copy's weights may be others."""
        if result is None or not self.is_exact:
            return False
        found, error = self._outcome(
            replacement, self.arguments if arguments is None else arguments
        )
        return error is None and close(found, result)

    def differs_as_recorded(self, replacement: Replacement) -> bool:
        """Whether the owner gives other values on the recorded arguments. Raises what it raises."""
        return not close(self.exact(replacement), self.exact(self.method.declared))

    def _differs(self, replacement: Replacement, name: str, arguments: Any) -> str:
        expected, expected_error = self._outcome(self.method.declared, arguments)
        found, found_error = self._outcome(replacement, arguments)
        if (expected_error is None) != (found_error is None):
            return f"{name} input: {expected_error or found_error!r} on one side only"
        if expected_error is None and not close(found, expected):
            return f"{name} input gives other values than the original dispatch"
        return ""

    def _whole_differs(self, replacement: Replacement) -> str:
        if self.whole is None:
            return ""
        recorded, result = self.whole
        arguments = exact_arguments(recorded)
        if self.gives(replacement, result, arguments):
            return ""
        return self._differs(replacement, "whole recorded", arguments)

    def _outcome(self, replacement: Replacement, arguments: Any) -> tuple[Any, Exception | None]:
        used = copy_arguments(arguments)
        try:
            result = self.exact(replacement, used)
        except Exception as error:  # user code: the error itself is what gets compared
            return None, error
        return result, None


def named_module(module: nn.Module, path: tuple[str, ...]) -> nn.Module:
    """The submodule at `path`."""
    return module.get_submodule(".".join(path))


class Subject(Replay):
    """A method that dispatches to the bank of `site`. container: the bank within the copy."""

    def __init__(
        self,
        site: Site,
        method: Method,
        bank_path: tuple[str, ...],
        recorded: Recorded,
        definition: ast.FunctionDef | None = None,
        whole: tuple[Recorded, Any] | None = None,
    ) -> None:
        modules = isinstance(site.bank, Bank)
        super().__init__(method, recorded, (site.bank.container,) if modules else (), whole)
        self.site = site
        self.bank_path = bank_path
        self.definition = definition
        self.container = self.moved[id(site.bank.container)]
        if not modules:
            tell_slices_apart(self.container)

    def recording(self) -> AbstractContextManager[ExpertRecord]:
        """Record what the experts of the copy are called on and return."""
        modules = isinstance(self.site.bank, Bank)
        return record_modules(self.container) if modules else record_slices(self.container)

    def native_recording(self) -> AbstractContextManager[SliceRecord]:
        """The same for slices, in the copy with the model's own dtypes."""
        return record_slices(named_module(self._native_copy, self.bank_path))
