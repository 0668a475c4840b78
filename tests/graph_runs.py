"""The real backend with Inductor left out: variants run as the lowered graphs, in seconds.

    with graph_level(monkeypatch): compiled = compile_model(model, interval=4)
    step = watched_call(entry_of(compiled), compiled, x, t, y)   # output + what was computed
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_compile
import moeca_compile.lowering.variants as variants_module
from moeca_compile.backend import moeca
from moeca_compile.runtime.entry import CompiledEntry
from moeca_compile.runtime.registry import REGISTRY


def use_graph_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run lowered graphs as they are instead of compiling kernels."""
    monkeypatch.setattr(variants_module, "inductor", lambda gm, inputs, mode, config: gm)


def compile_model(model: nn.Module, example: tuple[Any, ...], **options: Any) -> Any:
    """Captured ahead of time, so that the first call is one graph."""
    moeca_compile.prepare(model, *example)
    return torch.compile(model, backend=moeca, options=options, fullgraph=True)


def only_entry(compiled: Callable[..., Any]) -> CompiledEntry:
    """The single entry of a model called with one set of shapes."""
    (entry,) = REGISTRY.entries_of(compiled)
    return entry


@dataclass
class WatchedStep:
    """One call: output, kind of step, and per layer the branches and tokens that were rewritten."""

    output: Tensor
    kind: str
    pairs: list[set[tuple[int, int]]]
    attended: list[set[int]]


@torch.no_grad()
def watched_call(compiled: Callable[..., Any], *args: Any) -> WatchedStep:
    """Call and compare the lane's rows before and after: rows that changed were computed."""
    entries = REGISTRY.entries_of(compiled)
    before = {} if not entries else {n: v.clone() for n, v in _rows(entries[0]).items()}
    counts = moeca_compile.stats(compiled)
    output = compiled(*args)
    entry = only_entry(compiled)
    after, now = _rows(entry), moeca_compile.stats(compiled)
    kind = next(
        k
        for k in ("refresh", "reuse", "plain")
        if getattr(now, f"{k}_steps") > getattr(counts, f"{k}_steps")
    )
    pairs, attended = [], []
    for layer in entry.variants.analysis.plan.layers if before else ():
        slots = layer.region.top_k
        out = layer.name("slot_out")
        moved = (after[out] != before[out]).any(-1)[: layer.branches].reshape(-1, slots)
        ids = after[layer.name("slot_ids")]
        pairs.append({(int(t), int(ids[t, j])) for t, j in moved.nonzero()})
        name = layer.attention[0].root.name
        rows = (after[name] != before[name]).any(-1)[: layer.tokens]
        attended.append({int(t) for (t,) in rows.nonzero()})
    return WatchedStep(output, kind, pairs, attended)


def _rows(entry: CompiledEntry) -> dict[str, Tensor]:
    lanes = entry.store.lanes
    return entry.store.tensors(lanes[0]) if lanes else {}
