"""Fake ops of a dry run, each worked out once for operands of one look.

    linear(f32[6, 64], f32[64, 64])  ->  f32[6, 64]     worked out
    linear(f32[6, 64], f32[64, 64])  ->  f32[6, 64]     the very same value

A dry run asks how far a request gets, layer by layer: it repeats a few hundred ops thousands of
times, at about a millisecond each. Fake values hold no numbers, so one stands for all of its look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..torch_compat import is_fake

_MEMO = "_moeca_seen_ops"  # on the fake mode, which its values refer to: they end together
_PLAIN = (
    int,
    float,
    bool,
    str,
    type(None),
    type(...),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


class SeenOps(TorchFunctionMode):
    """Inside, an op on fakes of `fake_mode` gives what it gave for others of the same look.

    Only where nobody counts the ops, or asks which values share memory.
    """

    def __init__(self, fake_mode: Any) -> None:
        super().__init__()
        self._seen: dict[Any, Any] = vars(fake_mode).setdefault(_MEMO, {})

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if getattr(func, "__name__", "") == "__get__":  # x.shape and the like
            return func(*args, **named)
        key = _look((func, args, tuple(named.items())))
        if key is not None and key in self._seen:
            return self._seen[key]
        result = func(*args, **named)
        if key is not None and _holds_no_numbers(result):
            self._seen[key] = result
        return result


def _holds_no_numbers(result: Any) -> bool:
    values = result if isinstance(result, (tuple, list)) else (result,)
    return all(map(is_fake, values))


def _look(value: Any) -> Any:
    """Equal for values that a fake op treats alike; None where that is not known."""
    if isinstance(value, (tuple, list)):
        looks = tuple(_look(each) for each in value)
        return None if None in looks else (type(value), looks)
    if isinstance(value, Tensor):
        sizes = (*value.shape, *value.stride())
        constant = all(type(size) is int for size in sizes)
        return (value.dtype, value.device, sizes) if is_fake(value) and constant else None
    if isinstance(value, slice):
        return _look(("slice", value.start, value.stop, value.step))
    return (type(value), value) if isinstance(value, _PLAIN) or callable(value) else None
