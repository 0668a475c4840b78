"""Lanes: streams of calls told apart by their conditioning inputs (labels, text states, ...).

    call (x, t, labels)   -> lane 0        call (x, t, null)    -> lane 1      (two-call CFG)
    call (x, t, labels')  -> lane 2        a ninth lane takes the place of the one longest unused

A new lane takes the place of an older one that is done, too: whose generation was ended from
outside, whose timesteps have come down to zero, or that was not called for IDLE_CALLS calls of
others. So rows are held for as many lanes as are in use at once, whatever the number of prompts. A
lane taken too early costs its generation one refresh.

Two calls share a lane only when every conditioning input is equal: the same tensor object with the
same version counter and storage, or equal values. The storage is held, so an address cannot be
recycled into a false match. Where identity proves nothing (inference tensors have no version
counter, small CPU tensors may share memory with numpy) values decide.

Limit: a tensor of more than SMALL_ELEMENTS elements that is overwritten behind torch's back
(`x.data.copy_()`, numpy, a raw kernel) looks unchanged.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from moeca_compile.runtime.probe import JUMP_WINDOW

SMALL_ELEMENTS = 1024
MAX_LANES = 8
IDLE_CALLS = 4 * MAX_LANES  # lanes called in turn wait for MAX_LANES - 1 others
LAST_GAP = 1.5  # a falling timestep below this many of its last gaps was the last one
_COMPARABLE = (numbers.Number, str, torch.dtype, torch.device, type(None))

Conditioning: TypeAlias = Sequence[object]  # tensors, Python numbers, strings, None
Signature: TypeAlias = tuple[torch.Size, torch.dtype, torch.device] | None


class HeldTensor:
    """One conditioning tensor as a lane remembers it: a private copy, and the identity it had."""

    def __init__(self, tensor: Tensor) -> None:
        self.copy = tensor.detach().clone()
        self.small = tensor.is_cpu and tensor.numel() <= SMALL_ELEMENTS
        self._remember(tensor)

    def _remember(self, tensor: Tensor) -> None:
        # Identity is proof only while these two are held: no address can be given out again.
        self._tensor = tensor
        self._storage = None if self.small else tensor.untyped_storage()
        self._version = _version(tensor)
        self._pointer = tensor.data_ptr()

    def is_same(self, tensor: Tensor) -> bool:
        """True when `tensor` provably still holds the remembered values, at no device cost."""
        if self.small:
            return self.equals(tensor)
        return (
            tensor is self._tensor
            and self._version is not None
            and tensor._version == self._version
            and tensor.data_ptr() == self._pointer
            and tensor.shape == self.copy.shape
        )

    def equals(self, tensor: Tensor) -> bool:
        """True when shape, dtype, device and all values are equal; NaN equals nothing."""
        copy = self.copy
        if tensor.shape != copy.shape or tensor.dtype != copy.dtype:
            return False
        if tensor.device != copy.device:
            return False
        if not torch.equal(tensor, copy):
            return False
        if not self.small:
            self._remember(tensor)  # next time the identity is enough
        return True


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


@dataclass(eq=False)
class Lane:
    """What the tracker remembers of one lane. `key` is never used twice."""

    key: int
    signature: Signature
    held: tuple[object, ...]  # HeldTensor for tensors, the value itself for the rest
    generation: int = -1
    step: int = -1
    timestep: float | None = None
    problem: str = ""  # why the last call's timestep is None
    direction: int = 0  # +1 rising, -1 falling, 0 not known yet
    widest_gap: float = 0.0
    gap: float = 0.0  # between the last two timesteps
    called: int = 0  # number of its last call, in the order of all lanes' calls
    probe: Tensor | None = None
    chords: list[float] = field(default_factory=list)
    stale: str = ""  # why the rows may not be read at the next call
    stale_generation: bool = False  # ... and that call starts a new generation

    def matches(
        self, conditioning: Conditioning, compare: Callable[[HeldTensor, Tensor], bool]
    ) -> bool:
        """True when every input equals the lane's, tensors judged by `compare`."""
        if len(conditioning) != len(self.held):
            return False
        for held, given in zip(self.held, conditioning):
            if isinstance(held, HeldTensor):
                if not isinstance(given, Tensor) or not compare(held, given):
                    return False
            elif type(given) is not type(held) or given != held:
                return False
        return True

    def is_done(self, call: int) -> bool:
        """True when no further step of its generation is expected at the book's call `call`."""
        now = self.timestep
        ended = self.direction < 0 and now is not None and 0 <= now <= LAST_GAP * self.gap
        return self.stale_generation or ended or call - self.called > IDLE_CALLS

    def add_chord(self, chord: float) -> None:
        """Remember how far the sample moved, for the last JUMP_WINDOW calls."""
        self.chords.append(chord)
        del self.chords[:-JUMP_WINDOW]


class LaneBook:
    """The lanes in use, most recent first, at most `max_lanes`."""

    def __init__(self, max_lanes: int, on_evict: Callable[[int], None] | None) -> None:
        self.lanes: list[Lane] = []
        self.opened = 0
        self._calls = 0
        self._max_lanes = max_lanes
        self._on_evict = on_evict

    def find(self, conditioning: Conditioning, sample: Tensor | None) -> tuple[Lane, bool]:
        """(lane, whether it was opened by this call). To be called once per call."""
        self._calls += 1
        signature = None if sample is None else (sample.shape, sample.dtype, sample.device)
        given = [_plain(value) for value in conditioning]
        for compare in (HeldTensor.is_same, HeldTensor.equals):
            for position, lane in enumerate(self.lanes):
                if lane.signature == signature and lane.matches(given, compare):
                    lane.called = self._calls
                    self.lanes.insert(0, self.lanes.pop(position))
                    return lane, False
        return self._open(given, signature), True

    def clear(self) -> None:
        """Evict every lane."""
        while self.lanes:
            self._evict(self.lanes[-1])

    def _open(self, given: list[object], signature: Signature) -> Lane:
        done = [lane for lane in self.lanes if lane.is_done(self._calls)]
        if done or len(self.lanes) >= self._max_lanes:
            self._evict((done or self.lanes)[-1])
        held = tuple(HeldTensor(v) if isinstance(v, Tensor) else v for v in given)
        lane = Lane(self.opened, signature, held, called=self._calls)
        self.opened += 1
        self.lanes.insert(0, lane)
        return lane

    def _evict(self, lane: Lane) -> None:
        self.lanes.remove(lane)
        if self._on_evict is not None:
            self._on_evict(lane.key)


def _plain(value: object) -> object:
    """Numbers as plain Python ones; what cannot be compared safely becomes equal to nothing."""
    if isinstance(value, (Tensor, *_COMPARABLE)):
        return value
    if isinstance(value, torch.SymInt):
        return int(value)
    if isinstance(value, torch.SymFloat):
        return float(value)
    return float("nan")
