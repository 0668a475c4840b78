"""The calls of one run sorted by the expert whose slices of stacked parameters they depend on.

h = F.linear(x[token], up[3])     ->  region 3: entries [x[token]], linear(entry 0, slice up)
out.index_add_(0, token, h * w)       not in it: reads a tensor that has other rows
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..torch_compat import leaves, map_leaves
from .op_record import Op


@dataclass(frozen=True)
class Ref:
    """Where a tensor comes from. kind: call, slice, shared or entry."""

    kind: str
    name: str = ""
    number: int = 0
    leaf: int = 0


@dataclass
class Region:
    """Calls that depend on one expert's slices. wired: per call its arguments with Ref leaves."""

    ops: list[Op] = field(default_factory=list)
    wired: list[tuple[Any, Any]] = field(default_factory=list)
    entries: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)  # copies of the entries

    @property
    def rows(self) -> int:
        return self.entries[0].shape[0] if self.entries else -1


def refs_in(tree: Any) -> list[Ref]:
    return [leaf for leaf in leaves(tree)[0] if isinstance(leaf, Ref)]


def sort_calls(holder: nn.Module, stacks: dict[str, Tensor], ops: list[Op]) -> dict[int, Region]:
    """Per expert the calls that depend on its slices, and otherwise only on rows given to it."""
    return _Sorter(holder, stacks, ops).found


class _Sorter:
    """Sorts recorded calls by the expert whose slices they depend on."""

    def __init__(self, holder: nn.Module, stacks: dict[str, Tensor], ops: list[Op]) -> None:
        self.found: dict[int, Region] = {}
        self._stacks = {id(p): name for name, p in stacks.items()}
        named_tensors = (*holder.named_parameters(), *holder.named_buffers())
        self._shared = {id(p): name for name, p in named_tensors if id(p) not in self._stacks}
        self._slices: dict[int, tuple[str, int]] = {}
        self._inside: dict[int, tuple[int, int, int]] = {}  # tensor -> expert, call, leaf
        self._values: dict[int, Any] = {}
        for op in ops:
            self._sort(op)

    def _sort(self, op: Op) -> None:
        if any(id(t) in self._stacks for t in op.tensors):
            self._note_slices(op)
        else:
            experts = {e for t in op.tensors if (e := self._expert(t)) is not None}
            fits = len(experts) == 1 and self._join(op, experts.copy().pop())
            if not fits:
                for tensor in op.outputs:
                    self._inside.pop(id(tensor), None)
        for tensor, value in zip(op.outputs, _tensors(op.values)):
            self._values[id(tensor)] = value

    def _note_slices(self, op: Op) -> None:
        stack = next(t for t in op.tensors if id(t) in self._stacks)
        for out in op.outputs:
            step = stack.stride(0)
            offset = out.storage_offset() - stack.storage_offset()
            shared = out.untyped_storage().data_ptr() == stack.untyped_storage().data_ptr()
            if shared and out.shape == stack.shape[1:] and step and offset % step == 0:
                self._slices[id(out)] = (self._stacks[id(stack)], offset // step)

    def _expert(self, tensor: Tensor) -> int | None:
        if id(tensor) in self._slices:
            return self._slices[id(tensor)][1]
        return self._inside[id(tensor)][0] if id(tensor) in self._inside else None

    def _join(self, op: Op, expert: int) -> bool:
        """Add the call to the region of `expert` if all of its inputs allow it."""
        region = self.found.setdefault(expert, Region())
        entries = list(region.entries)
        for tensor in op.tensors:
            known = self._expert(tensor) is not None or id(tensor) in self._shared
            if known or any(tensor is entry for entry in entries):
                continue
            rows = entries[0].shape[0] if entries else -1
            if not tensor.is_floating_point() or not tensor.dim() or rows not in (-1, len(tensor)):
                return False
            entries.append(tensor)
        for tensor in entries[len(region.entries) :]:
            region.values.append(self._values.get(id(tensor), tensor))
        region.entries = entries
        region.wired.append(map_leaves(lambda t: self._ref(t, region), (op.args, op.kwargs)))
        region.ops.append(op)
        for leaf, tensor in enumerate(op.outputs):
            self._inside[id(tensor)] = (expert, len(region.ops) - 1, leaf)
        return True

    def _ref(self, leaf: Any, region: Region) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in self._inside:
            _, number, place = self._inside[id(leaf)]
            return Ref("call", number=number, leaf=place)
        if id(leaf) in self._slices:
            return Ref("slice", name=self._slices[id(leaf)][0])
        if id(leaf) in self._shared:
            return Ref("shared", name=self._shared[id(leaf)])
        return Ref("entry", number=[e is leaf for e in region.entries].index(True))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(tree)[0] if isinstance(leaf, Tensor)]
