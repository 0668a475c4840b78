"""One eager forward, watched: which functions call which experts, with how many rows.

    MoE.forward -> [expert(x) for ..]   =>   Site(owner MoE, bank "experts", frames (MoE.forward,))

Only the first call of each owner is kept; its arguments are copied, so the owner can be replayed
alone as often as the analysis needs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

from .banks import Bank, find_banks
from .host_reads import HostRead, HostReads
from .method import Method, find_method
from .sandbox import copy_arguments
from .stacked import StackedBank

MAX_CALLERS = 3
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@dataclass
class Site:
    """One bank and what was seen to call it, innermost caller first."""

    bank: Bank | StackedBank
    callers: tuple[Method, ...]
    rows: dict[int, int] = field(default_factory=dict)
    integers: list[Tensor] = field(default_factory=list)
    location: str = ""

    @property
    def routed(self) -> bool:
        """Whether an integer tensor in sight says how many rows each expert received."""
        if isinstance(self.bank, StackedBank):
            return True  # found by what it reads on the host, not by rows
        return any(counts_match(ids, self.rows, self.bank.size) for ids in self.integers)

    @property
    def uneven(self) -> bool:
        """Whether experts received different numbers of rows, or some none."""
        return len({self.rows.get(i, 0) for i in range(self.bank.size)}) > 1


@dataclass(frozen=True)
class Observation:
    """sites: one per bank and calling method; arguments: first (args, kwargs) per owner id;
    results: what the owners of sites returned then, by the same id.

    every_read: host reads; last_expert: when an expert was called last; result: of the root.
    """

    sites: tuple[Site, ...]
    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]]
    results: dict[int, Any] = field(default_factory=dict)
    every_read: tuple[HostRead, ...] = ()
    last_expert: int = 0
    result: Any = None

    @property
    def reads(self) -> tuple[HostRead, ...]:
        """Host reads up to the last call of an expert."""
        return tuple(read for read in self.every_read if read.order < self.last_expert)


def counts_match(ids: Tensor, rows: dict[int, int], experts: int) -> bool:
    """Whether ids in [0, experts) occur as often as experts received rows.

    Experts that no id names may have been called on dummy rows. In a table of ids [.., K] an
    expert that a token names twice may have received its row once.
    """
    if ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= experts:
        return False
    forms = [ids.reshape(-1), unrepeated(ids)]
    return any(_counts_match(torch.bincount(f.long(), minlength=experts), rows) for f in forms)


def _counts_match(counted: Tensor, rows: dict[int, int]) -> bool:
    counts = counted.tolist()
    return all(count in (0, rows.get(index, 0)) for index, count in enumerate(counts)) and all(
        counts[index] > 0 or seen <= 1 for index, seen in rows.items()
    )


def unrepeated(ids: Tensor) -> Tensor:
    """The ids of a table [.., K] without those that stand further left in their row already."""
    if ids.dim() < 2:
        return ids.reshape(-1)
    table = ids.reshape(-1, ids.shape[-1])
    same = table.unsqueeze(2) == table.unsqueeze(1)
    return table[~same.tril(-1).any(2)]


def is_integer(value: object) -> bool:
    """Whether `value` is a tensor that could hold expert numbers."""
    return isinstance(value, Tensor) and value.dtype in _INTEGERS


def observe(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Observation:
    """Run `root` once on copies of its arguments and note the calls of every bank's experts."""
    watch = _Watch(root)
    try:
        with watch.host.watching():
            result = root(*copy_arguments(args), **copy_arguments(kwargs))
    finally:
        watch.remove()
    sites, reads = tuple(watch.sites.values()), tuple(watch.host.reads)
    return Observation(sites, watch.arguments, watch.results, reads, watch.last_expert, result)


def observe_arguments(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], owners: list[nn.Module]
) -> dict[int, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Run `root` once more and copy the arguments of the first call of each owner, by its id."""
    found: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(module) not in found:
            found[id(module)] = (copy_arguments(args), copy_arguments(kwargs))

    handles = [owner.register_forward_pre_hook(note, with_kwargs=True) for owner in owners]
    try:
        root(*copy_arguments(args), **copy_arguments(kwargs))
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Watch:
    def __init__(self, root: nn.Module) -> None:
        self.host = HostReads()
        self.last_expert = 0  # when an expert was called last
        self.paths = {id(module): path for path, module in root.named_modules()}
        self.sites: dict[tuple[int, int, CodeType], Site] = {}
        self.arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.results: dict[int, Any] = {}
        self._frames: dict[tuple[int, int, CodeType], FrameType | None] = {}  # None: returned
        self._handles: list[Any] = []
        for bank in find_banks(root):
            for index, expert in enumerate(bank.experts):
                hook = self._expert_hook(bank, index)
                self._handles.append(expert.register_forward_pre_hook(hook, with_kwargs=True))
            for owner in _ancestors(root, bank.path):
                handle = owner.register_forward_pre_hook(self._owner_hook, with_kwargs=True)
                self._handles.append(handle)
                self._handles.append(owner.register_forward_hook(self._returned, always_call=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._frames.clear()

    def _owner_hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(module) not in self.arguments:
            self.arguments[id(module)] = (copy_arguments(args), copy_arguments(kwargs))

    def _returned(self, module: nn.Module, _: Any, result: Any) -> None:
        # A frame keeps its locals: the activations of every layer would be alive at once.
        for key in [key for key in self._frames if key[1] == id(module)]:
            self._frames[key] = None
            if id(module) not in self.results:
                self.results[id(module)] = copy_arguments(result)

    def _expert_hook(self, bank: Bank, index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.last_expert = self.host.tick()
            self._note(bank, index, args, kwargs, sys._getframe(1))

        return hook

    def _note(
        self,
        bank: Bank,
        index: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: FrameType,
    ) -> None:
        frames = _callers(frame, self.paths, bank)
        if not frames:
            return
        inner, method = frames[0]
        key = (id(bank.container), id(method.module), inner.f_code)
        if key not in self.sites:
            location = f"{inner.f_code.co_filename}:{inner.f_lineno} {method.function.__qualname__}"
            site = Site(bank, tuple(method for _, method in frames), location=location)
            for seen, _ in frames:
                values = seen.f_locals.values()
                site.integers.extend(value.clone() for value in values if is_integer(value))
            self.sites[key], self._frames[key] = site, inner
        if self._frames[key] is not inner:
            return  # a later call of the same function: the first one is enough
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim() > 0]
        rows = self.sites[key].rows
        rows[index] = rows.get(index, 0) + (tensors[0].shape[0] if tensors else 0)


def _ancestors(root: nn.Module, path: str) -> list[nn.Module]:
    """The bank at `path`, which may dispatch itself, and the modules above it, nearest first."""
    parts = path.split(".") if path else []
    chain = [root.get_submodule(".".join(parts[:n])) for n in range(len(parts), -1, -1)]
    return chain[: MAX_CALLERS + 1]


def _callers(frame: FrameType, paths: dict[int, str], bank: Bank) -> list[tuple[FrameType, Method]]:
    """Methods on the stack whose module holds the bank, innermost first.

    Comprehension frames, hooks and torch's own frames have no such module as first local.
    """
    found: list[tuple[FrameType, Method]] = []
    current: FrameType | None = frame
    while current is not None and len(found) < MAX_CALLERS:
        method = _method_of(current, paths, bank)
        if method is not None:
            found.append((current, method))
        current = current.f_back
    return found


def _method_of(frame: FrameType, paths: dict[int, str], bank: Bank) -> Method | None:
    code = frame.f_code
    if not code.co_argcount or code.co_filename == nn.Module.__call__.__code__.co_filename:
        return None
    owner = frame.f_locals.get(code.co_varnames[0])
    if not isinstance(owner, nn.Module) or id(owner) not in paths:
        return None
    path = paths[id(owner)]
    if path and owner is not bank.container and not bank.path.startswith(f"{path}."):
        return None
    return find_method(owner, path, code)
