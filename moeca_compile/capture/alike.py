"""Whether two modules are the same code with the same settings, so that only weights differ.

    blocks.0.moe proven by every probe; blocks.1.moe alike   =>   its one recorded input suffices

What was learned on one layer of twelve need not be learned on the other eleven.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..torch_compat import leaves
from .method import Method

_KEPT_APART = ("_parameters", "_buffers", "_modules")
_CONSTANTS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def same_method(one: Method, other: Method) -> bool:
    """Whether the methods do the same on the same arguments, but for the values of weights."""
    facts = ("function", "attribute", "on_instance", "overridden")
    same = all(getattr(one, fact) == getattr(other, fact) for fact in facts)
    declared = one.on_instance or one.declared == other.declared
    return same and declared and same_modules(one.module, other.module)


def same_modules(one: nn.Module, other: nn.Module) -> bool:
    """Whether both are built alike: classes, settings, hooks, shapes; not values of weights."""
    first, second = list(one.named_modules()), list(other.named_modules())
    if [path for path, _ in first] != [path for path, _ in second]:
        return False
    return all(_same_module(a, b) for (_, a), (_, b) in zip(first, second, strict=True))


def same_kinds(one: Any, other: Any) -> bool:
    """Whether nested arguments differ in the values of tensors only."""
    (first, shape), (second, other_shape) = leaves(one), leaves(other)
    return shape == other_shape and all(map(_same_kind, first, second))


def _same_module(one: nn.Module, other: nn.Module) -> bool:
    if type(one) is not type(other) or list(one._modules) != list(other._modules):
        return False
    weights = ((one._parameters, other._parameters), (one._buffers, other._buffers))
    if not all(_same_items(a, b, _same_weight) for a, b in weights):
        return False
    return _same_items(_settings(one), _settings(other), _same_value)


def _settings(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _KEPT_APART}


def _same_items(one: Mapping[Any, Any], other: Mapping[Any, Any], same: Any) -> bool:
    return list(one) == list(other) and all(same(one[key], other[key]) for key in one)


def _same_kind(one: Any, other: Any) -> bool:
    """Tensors by what they are, everything else by value."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return _same_value(one, other)
    facts = ("shape", "dtype", "device", "layout", "requires_grad")
    return type(one) is type(other) and all(getattr(one, f) == getattr(other, f) for f in facts)


def _same_weight(one: Any, other: Any) -> bool:
    """What is no vector of real numbers may be a setting: a capacity, a switch."""
    if isinstance(one, Tensor) and (one.numel() == 1 or not one.is_floating_point()):
        return _same_value(one, other)
    return _same_kind(one, other)


def _same_value(one: Any, other: Any) -> bool:
    """False where it cannot be told: an object that is not the same one may hold anything."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, _CONSTANTS):
        return bool(one == other)
    if isinstance(one, Tensor):
        return _same_kind(one, other) and torch.equal(one, other)
    if isinstance(one, Mapping):
        return _same_items(one, other, _same_value)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same_value, one, other))
    if isinstance(one, (set, frozenset)):
        return bool(one == other)
    if isinstance(one, partial):
        parts = ("func", "args", "keywords")
        return all(_same_value(getattr(one, part), getattr(other, part)) for part in parts)
    return False
