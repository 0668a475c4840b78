"""The real backend with Inductor left out: variants run as the lowered graphs, in seconds.

use_graph_level(monkeypatch)
compiled = compile_model(model, (x, t, y), interval=4)
step = watched_call(compiled, x, t, y)    # output, kind of step, branches and tokens computed
entry = only_entry(compiled)              # its store, variants and plan
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
from moeca_compile.graph.region import ChoiceRegion
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
    shared: list[set[int]]


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
    pairs, attended, shared = [], [], []
    for layer in entry.variants.analysis.plan.layers if before else ():
        out, ids = layer.name("slot_out"), after[layer.name("slot_ids")]
        moved = (after[out] != before[out]).any(-1)[: layer.branches].reshape(ids.shape)
        if isinstance(layer.region, ChoiceRegion):  # ids [R]: token * E + expert
            branches = [divmod(int(b), layer.region.num_experts) for b in ids[moved]]
            pairs.append(set(branches))
        else:
            pairs.append({(int(t), int(ids[t, j])) for t, j in moved.nonzero()})
        written = [_moved(before, after, [a.root.name], layer.tokens) for a in layer.attention]
        attended.append(set().union(*written))
        shared.append(_moved(before, after, [c.name for c in layer.shared], layer.tokens))
    return WatchedStep(output, kind, pairs, attended, shared)


def _moved(
    before: dict[str, Tensor], after: dict[str, Tensor], names: list[str], tokens: int
) -> set[int]:
    """Tokens whose row changed in any of the caches."""
    return {
        int(t)
        for name in names
        for (t,) in (after[name] != before[name]).any(-1)[:tokens].nonzero()
    }


def _rows(entry: CompiledEntry) -> dict[str, Tensor]:
    lanes = entry.store.lanes
    return entry.store.tensors(lanes[0]) if lanes else {}
