"""A method of a module, found by the code that runs, and whether it can be replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import Any, cast

import torch
from torch import nn

from ..torch_compat import is_compile_wrapper


@dataclass(frozen=True)
class Method:
    """A method of `module` found on the stack above an expert call.

    attribute: the name it is installed under; function: the plain function, undecorated; declared:
    what the class or instance holds (maybe decorated); on_instance: it sits in the instance dict.
    overridden: a subclass has the attribute too, so that it was reached through `super()`.
    """

    path: str
    module: nn.Module
    attribute: str
    function: FunctionType
    declared: Callable[..., Any]
    on_instance: bool
    overridden: bool = False

    @property
    def plain(self) -> FunctionType:
        """`function`, which type checkers take for a method of this class."""
        return cast(FunctionType, self.function)

    @property
    def obstacle(self) -> str:
        """Why the method cannot be replaced on the instance by something of equal effect."""
        if self.overridden:
            return f"{self.function.__qualname__} is called through super(), not by its name"
        if not self._decorators_are_neutral:
            return f"{self.attribute} is decorated and the decorator may matter"
        return ""

    @property
    def location(self) -> str:
        code = self.function.__code__
        return f"{code.co_filename}:{code.co_firstlineno} {self.function.__qualname__}"

    @property
    def _decorators_are_neutral(self) -> bool:
        """Whether the wrappers around the function, if any, only switch gradients or compile it."""
        current: Any = self.declared
        while current is not self.function:
            cells = getattr(current, "__closure__", None) or ()
            factories = [getattr(_content(cell), "__self__", None) for cell in cells]
            grad_modes = (torch.no_grad, torch.inference_mode, torch.set_grad_enabled)
            compiles = is_compile_wrapper(current)
            if not compiles and not any(isinstance(factory, grad_modes) for factory in factories):
                return False
            current = current.__wrapped__
        return True


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def find_method(owner: nn.Module, path: str, code: CodeType) -> Method | None:
    """The attribute of `owner` through which `code` runs, or None if it is not a method of it."""
    for name, value in vars(owner).items():
        if isinstance(value, MethodType) and value.__self__ is owner:
            function = _undecorated(value.__func__, code)
            if function is not None:
                return Method(path, owner, name, function, value.__func__, True)
    classes = type(owner).__mro__
    for place, cls in enumerate(classes):
        for name, value in vars(cls).items():
            function = _undecorated(value, code)
            if function is not None and name not in vars(owner):
                overridden = any(name in vars(sub) for sub in classes[:place])
                return Method(path, owner, name, function, value, False, overridden)
    return None


def _undecorated(value: Any, code: CodeType) -> FunctionType | None:
    while isinstance(value, FunctionType):
        if value.__code__ is code:
            return value
        value = getattr(value, "__wrapped__", None)
    return None
