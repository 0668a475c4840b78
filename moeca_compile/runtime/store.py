"""Where the cached rows live: one dict of tensors per lane, sized before it is allocated.

layout = CacheLayout([CacheSpec("blocks.0.slot_out", (512, 2, 128), torch.float32, cpu, "branch")])
layout.nbytes                      -> 524288, before anything is allocated
store.tensors(lane=3)              -> allocates once; the same tensors (same addresses) ever after
store.retire(3); store.tensors(4)  -> lane 3's tensors, not allocated again
store.nbytes == layout.nbytes * len(store.lanes), and once more between the two calls above
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CacheSpec:
    """One cached tensor of one lane. `kind` groups tensors for reports and `refill`.

    fill: what an unwritten element holds (-1 for expert ids, so that it can match no expert).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    kind: str
    fill: float = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, from shape and dtype alone."""
        return math.prod(self.shape) * self.dtype.itemsize


class CacheLayout:
    """All tensors of one lane. Raises ValueError when two share a name."""

    def __init__(self, specs: Iterable[CacheSpec]) -> None:
        self.specs = tuple(specs)
        names = [spec.name for spec in self.specs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"cache layout: expected distinct names, got twice: {twice}")

    @property
    def nbytes(self) -> int:
        """Bytes of one lane."""
        return sum(spec.nbytes for spec in self.specs)

    def nbytes_by_kind(self) -> dict[str, int]:
        """Bytes of one lane, per `kind`, in the order of the specs."""
        total: dict[str, int] = {}
        for spec in self.specs:
            total[spec.kind] = total.get(spec.kind, 0) + spec.nbytes
        return total


class CacheStore:
    """Tensors per lane; allocates, hands out, frees. Decides nothing."""

    def __init__(self, layout: CacheLayout) -> None:
        self.layout = layout
        self._lanes: dict[int, dict[str, Tensor]] = {}
        self._spare: dict[str, Tensor] | None = None

    @property
    def lanes(self) -> tuple[int, ...]:
        """Lanes that hold memory now."""
        return tuple(self._lanes)

    @property
    def nbytes(self) -> int:
        """Bytes really held, read from the tensors' storages."""
        held = [*self._lanes.values(), *([self._spare] if self._spare else [])]
        return sum(t.untyped_storage().nbytes() for tensors in held for t in tensors.values())

    def tensors(self, lane: int) -> dict[str, Tensor]:
        """The lane's tensors by name, allocated on the first call and never again. They may have
        been another lane's, whose values they hold until they are written."""
        found = self._lanes.get(lane)
        if found is None:
            found = self._spare or {spec.name: _allocate(spec) for spec in self.layout.specs}
            self._lanes[lane], self._spare = found, None
        return found

    def refill(self, lane: int, kind: str) -> None:
        """Set the lane's tensors of `kind` back to their `fill`, in place (a new generation)."""
        tensors = self.tensors(lane)
        with torch.no_grad():
            for spec in self.layout.specs:
                if spec.kind == kind:
                    tensors[spec.name].fill_(spec.fill)

    def retire(self, lane: int) -> None:
        """The lane is no more; its tensors are the next new lane's, one set of them at most. That
        saves the allocation, and CUDA graphs are recorded for addresses. A lane without any is no
        error."""
        self._spare = self._lanes.pop(lane, None) or self._spare

    def reset(self) -> None:
        """Let go of all memory."""
        self._lanes.clear()
        self._spare = None


def _allocate(spec: CacheSpec) -> Tensor:
    # An inference tensor could not be written again outside inference mode.
    with torch.inference_mode(False), torch.no_grad():
        return torch.full(spec.shape, spec.fill, dtype=spec.dtype, device=spec.device)
