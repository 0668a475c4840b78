"""Replaying one MoE module alone, in exact arithmetic, with weights that tell experts apart.

A copy is taken, so nothing the replay does reaches the user's model. Parameters are shared unless
they are low precision or degenerate: all-zero or identical experts would let any hypothesis pass.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..torch_compat import leaves, map_leaves
from .banks import experts_of
from .stacked import stacked_parameters

TOLERANCE = 1e-5
_EXACT = (torch.float32, torch.float64)


def exact_copy(
    module: nn.Module, containers: list[nn.Module]
) -> tuple[nn.Module, dict[int, nn.Module]]:
    """A copy of `module` in float32 or float64, and where each of its submodules went, by id.

    Raises whatever deepcopy raises for modules that cannot be copied.
    """
    parameters = list(module.parameters())
    low = any(
        p.is_floating_point() and p.dtype not in _EXACT for p in (*parameters, *module.buffers())
    )
    memo: dict[int, Any] = {} if low else {id(p): p for p in parameters}
    clone = copy.deepcopy(module, memo)
    if low:
        clone.float()
    moved = {id(m): clone.get_submodule(path) for path, m in module.named_modules()}
    generator = torch.Generator().manual_seed(0)
    for submodule in clone.modules():
        _fill(submodule, generator, only_zero=True)
    for container in containers:
        experts = experts_of(moved[id(container)])
        if _identical(experts):
            for submodule in itertools.chain.from_iterable(e.modules() for e in experts[1:]):
                _fill(submodule, generator, only_zero=False)
    return clone, moved


def _identical(experts: tuple[nn.Module, ...]) -> bool:
    first = list(experts[0].parameters())
    return any(all(torch.equal(a, b) for a, b in zip(first, e.parameters())) for e in experts[1:])


def _fill(module: nn.Module, generator: torch.Generator, only_zero: bool) -> None:
    for name, parameter in module._parameters.items():
        if parameter is None or not parameter.is_floating_point() or parameter.is_meta:
            continue
        if only_zero and not _is_zero(parameter):
            continue
        noise = torch.randn(parameter.shape, generator=generator) * 0.1
        value = parameter.detach() + noise.to(parameter)
        module._parameters[name] = nn.Parameter(value, requires_grad=False)


def _is_zero(parameter: Tensor) -> bool:
    # Mostly the first row says no already: the others need not be read.
    return not (parameter.dim() and bool(parameter[:1].any())) and not bool(parameter.any())


def tell_slices_apart(holder: nn.Module) -> None:
    """Change stacked parameters of a copy whose slices are equal."""
    generator = torch.Generator().manual_seed(0)
    stacks = stacked_parameters(holder)
    if all(bool((p[1:] == p[:-1]).flatten(1).all(1).any()) for p in stacks.values()):
        for module in (holder, *holder.children()):
            _fill(module, generator, only_zero=False)


def exact_arguments(tree: Any) -> Any:
    """Nested arguments with low-precision floats as float32, every tensor a fresh copy."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        low = leaf.is_floating_point() and leaf.dtype not in _EXACT
        return leaf.float() if low else leaf.clone()

    return map_leaves(convert, tree)


def probe_arguments(tree: Any) -> Iterator[tuple[str, Any]]:
    """Inputs that a dispatch must treat alike: as recorded, Gaussian, one row repeated, zero.

    Repeating one row sends all tokens to the same experts: it exposes capacity limits that
    recorded inputs never reach.
    """
    generator = torch.Generator().manual_seed(0)

    def gaussian(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator).to(t) * t.std(correction=0).clamp(min=0.1)

    def constant(t: Tensor) -> Tensor:
        return gaussian(t[(0,) * (t.dim() - 1)]).expand_as(t).clone() if t.dim() > 1 else t.clone()

    for name, change in (
        ("recorded", torch.clone),
        ("Gaussian", gaussian),
        ("constant-row", constant),
        ("zero", torch.zeros_like),
    ):
        yield name, map_leaves(lambda leaf, f=change: _changed(leaf, f), tree)


def _changed(leaf: Any, change: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return change(leaf) if leaf.is_floating_point() and leaf.numel() else leaf.clone()


def close(found: Any, expected: Any) -> bool:
    """Whether nested results agree: tensors to TOLERANCE of their scale, the rest by type."""
    found_leaves, found_spec = leaves(found)
    expected_leaves, expected_spec = leaves(expected)
    if found_spec != expected_spec:
        return False
    return all(_close_leaf(a, b) for a, b in zip(found_leaves, expected_leaves))


def _close_leaf(found: Any, expected: Any) -> bool:
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        return type(found) is type(expected)
    if found.shape != expected.shape:
        return False
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    if expected.numel() == 0:
        return True
    scale = float(expected.nan_to_num().abs().max())
    atol = TOLERANCE * max(scale, 1e-6)
    return torch.allclose(found.to(expected.dtype), expected, rtol=0.0, atol=atol, equal_nan=True)
