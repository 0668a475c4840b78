"""Experts that are no modules but slices of stacked parameters, by structure.

Experts(up [8, 256, 64], up_bias [8, 256], down [8, 64, 128])   ->  StackedBank(path, module, 8)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .banks import find_banks

_CONVOLUTIONS = nn.modules.conv._ConvNd
_MATRICES = 2  # an expert has at least one layer in and one out


@dataclass(frozen=True)
class StackedBank:
    """A module below which parameters [size, ...] hold one expert a slice."""

    path: str
    container: nn.Module
    size: int
    difference: str = ""


def stacked_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Parameters of `module` and its children that look like stacks of one size [E, ...], by name.

    Vectors and numbers of each expert, [E, D] and [E], count where at least two parameters hold a
    matrix of each expert, [E, .., ..].
    """
    owners = [("", module), *((f"{name}.", child) for name, child in module.named_children())]
    named = {
        f"{prefix}{name}": parameter
        for prefix, owner in owners
        if not isinstance(owner, _CONVOLUTIONS)
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter.dim() >= 1
    }
    sizes = [p.shape[0] for p in named.values() if p.dim() >= 3 and p.shape[0] >= 2]
    size = max(sizes, key=sizes.count, default=0)
    if sizes.count(size) < _MATRICES:
        return {}
    return {name: p for name, p in named.items() if p.shape[0] == size}


def may_dispatch(root: nn.Module) -> bool:
    """Whether anything below `root` looks like a bank of experts, be they modules or slices."""
    return bool(find_banks(root)) or any(stacked_parameters(m) for m in root.modules())
