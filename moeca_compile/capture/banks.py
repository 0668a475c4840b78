"""Finding expert banks by structure: containers of interchangeable children that hold no bank.

ModuleList(8 x Expert(gate_up [512, 128], down [128, 256]))  ->  Bank(path, 8 experts)
ModuleList(8 x Block(.., experts=ModuleList))                ->  no bank: a list of layers
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Bank:
    """A container of experts; `difference` says why they are not interchangeable, else ""."""

    path: str
    container: nn.Module
    difference: str

    @property
    def size(self) -> int:
        return len(experts_of(self.container))

    @property
    def experts(self) -> tuple[nn.Module, ...]:
        return experts_of(self.container)


def experts_of(container: nn.Module) -> tuple[nn.Module, ...]:
    """The children in their order; unlike `children()` a child that occurs twice counts twice."""
    return tuple(child for child in container._modules.values() if child is not None)


def find_banks(root: nn.Module) -> tuple[Bank, ...]:
    """All containers under `root` that could be expert banks, by structure alone."""
    candidates = {
        path: Bank(path, module, _difference(experts_of(module)))
        for path, module in root.named_modules()
        if _is_container(module) and len(experts_of(module)) >= 2
    }
    containers = {id(bank.container) for bank in candidates.values()}
    return tuple(
        bank
        for bank in candidates.values()
        if not any(
            id(inner) in containers
            for expert in bank.experts
            for inner in expert.modules()
            if inner is not bank.container
        )
    )


def _is_container(module: nn.Module) -> bool:
    if isinstance(module, _CONTAINERS):
        return True
    holds_state = bool(module._parameters) or bool(module._buffers)
    names = module._modules.keys()
    numbered = list(names) == [str(i) for i in range(len(names))]
    return numbered and not holds_state and type(module).forward is nn.Module.forward


def _difference(experts: tuple[nn.Module, ...]) -> str:
    first = _signature(experts[0])
    for index, expert in enumerate(experts[1:], 1):
        if type(expert) is not type(experts[0]):
            classes = type(expert).__name__, type(experts[0]).__name__
            return f"expert {index} is a {classes[0]}, expert 0 a {classes[1]}"
        if _signature(expert) != first:
            return f"expert {index} has other parameters or submodules than expert 0"
    return "" if first[0] else "the children hold no parameters"


def _signature(expert: nn.Module) -> tuple[object, object]:
    parameters = tuple((name, tuple(p.shape), p.dtype) for name, p in expert.named_parameters())
    classes = tuple((name, type(module)) for name, module in expert.named_modules())
    return parameters, classes
