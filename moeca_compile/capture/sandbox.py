"""Running a user's model for analysis without leaving traces behind.

Random state, module attributes, buffers and the arguments are put back or copied; what a forward
does outside of its modules (files, sockets, globals) cannot be undone and happens once more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..torch_compat import map_leaves


@contextlib.contextmanager
def undisturbed(root: nn.Module) -> Iterator[None]:
    """Restore the random state and everything `root`'s forward stores on its modules."""
    devices = sorted({t.device.index or 0 for t in root.parameters() if t.device.type == "cuda"})
    saved = [(module, _shallow(vars(module))) for module in root.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in root.buffers()]
    # inference mode off first: leaving it switches gradients on, and its tensors have no version
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.no_grad():
        try:
            yield
        finally:
            for module, attributes in saved:
                _put_back(module, attributes)
            for buffer, content in buffers:
                if not torch.equal(buffer, content):
                    buffer.copy_(content)


def _shallow(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        name: (value, value.copy() if isinstance(value, (list, dict, set)) else None)
        for name, value in attributes.items()
    }


def _put_back(module: nn.Module, saved: dict[str, tuple[Any, Any]]) -> None:
    current = vars(module)
    for name in [name for name in current if name not in saved]:
        del current[name]
    for name, (value, content) in saved.items():
        current[name] = value
        if content is None or _same_items(value, content):
            continue
        if isinstance(value, list):
            value[:] = content
        else:
            value.clear()
            value.update(content)


def _same_items(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return list(one) == list(two) and all(one[key] is two[key] for key in one)
    return len(one) == len(two) and all(a is b for a, b in zip(one, two))


def copy_arguments(tree: Any) -> Any:
    """A copy of nested arguments: tensors cloned, containers rebuilt, other objects shared."""
    return map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


@contextlib.contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, no reduced-precision matmuls: values can be compared."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
