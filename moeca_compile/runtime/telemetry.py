"""What ran, counted from what ran: every reuse graph hands back its own counts.

    reuse graph -> int64 [layers, len(FIELDS)]  --add_, on its device, no host sync-->  [L, F]
    Counters.stats() -> one read, folded with the steps into a frozen Stats (report.py)

Refresh and plain steps compute everything and count in full. Sums are kept, not the tensors
themselves: under CUDA graphs the next replay overwrites them, and memory stays bounded.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

import torch
from torch import Tensor

from moeca_compile.policies.protocol import Decision
from moeca_compile.runtime.stats import LayerCost, LayerStats, Stats

# attention_run, shared_run: rows really computed, padding included.
FIELDS = (
    "branches_computed",
    "tokens_attended",
    "unmatched",
    "dropped",
    "shared_rows",
    "attention_run",
    "shared_run",
)
MAX_EVENTS = 256


class Counters:
    """Running totals of one compiled entry.

    layers: one cost per MoE layer, in the row order of what reuse graphs return. fixed_flops: what
    every step spends outside the layers' rows.
    """

    def __init__(self, layers: Sequence[LayerCost], fixed_flops: float = 0.0) -> None:
        self.layers = tuple(layers)
        self.fixed_flops = fixed_flops
        self.reset()

    def reset(self) -> None:
        """Start counting at zero."""
        self._plain = self._refresh = self._reuse = 0
        self._reasons: Counter[str] = Counter()
        self._events: deque[str] = deque(maxlen=MAX_EVENTS)
        self._sums: dict[torch.device, Tensor] = {}

    def ran(self, decision: Decision, counts: Tensor | None = None) -> None:
        """Count one step after its variant returned.

        counts: int64 [layers, len(FIELDS)] from the graph, required for "reuse" and only for it.
        Raises ValueError for another shape or dtype; reads no value.
        """
        if (counts is not None) != (decision.kind == "reuse"):
            raise ValueError(f"counters: counts go with reuse steps only, got {decision.kind!r}")
        if counts is not None:
            self._add(counts)
            self._reuse += 1
        elif decision.kind == "refresh":
            self._refresh += 1
            self._reasons[decision.reason] += 1
        else:
            self._plain += 1

    def event(self, text: str) -> None:
        """Note something worth reading later; the last MAX_EVENTS are kept."""
        self._events.append(text)

    def stats(self, *, cache_bytes: int = 0, generations: int = 0, lanes: int = 0) -> Stats:
        """Everything counted so far; the only place that waits for the device."""
        folded = self._fold()
        full_steps = self._plain + self._refresh
        rows = tuple(
            _layer_stats(cost, full_steps, self._reuse, counted)
            for cost, counted in zip(self.layers, folded)
        )
        fixed = self.fixed_flops * (full_steps + self._reuse)
        return Stats(
            plain_steps=self._plain,
            refresh_steps=self._refresh,
            reuse_steps=self._reuse,
            layers=rows,
            fixed_flops=fixed,
            cache_bytes=cache_bytes,
            generations=generations,
            lanes=lanes,
            reasons=Counter(self._reasons),
            events=tuple(self._events),
        )

    def _add(self, counts: Tensor) -> None:
        expected = (len(self.layers), len(FIELDS))
        if tuple(counts.shape) != expected or counts.dtype != torch.int64:
            raise ValueError(
                f"counters: expected int64 {expected}, got {counts.dtype} {tuple(counts.shape)}"
            )
        total = self._sums.get(counts.device)
        # An inference tensor could not be added to outside inference mode.
        with torch.inference_mode(False), torch.no_grad():
            if total is None:
                total = self._sums[counts.device] = torch.zeros(
                    expected, dtype=torch.int64, device=counts.device
                )
            total.add_(counts)

    def _fold(self) -> list[list[int]]:
        folded = torch.zeros(len(self.layers), len(FIELDS), dtype=torch.int64)
        for total in self._sums.values():
            folded += total.cpu()
        return folded.tolist()


def _layer_stats(cost: LayerCost, full: int, reuse: int, counted: Sequence[int]) -> LayerStats:
    count = dict(zip(FIELDS, counted))
    return LayerStats(
        name=cost.name,
        branches_total=cost.branches * (full + reuse),
        branches_computed=cost.branches * full + count["branches_computed"],
        tokens_total=cost.tokens * (full + reuse),
        tokens_attended=cost.tokens * full + count["tokens_attended"],
        shared_rows=cost.shared_rows * full + count["shared_rows"],
        unmatched=count["unmatched"],
        dropped=count["dropped"],
        flops_full=cost.full_flops * (full + reuse),
        flops_computed=cost.full_flops * full
        + cost.branch_flops * count["branches_computed"]
        + cost.token_flops * count["attention_run"]
        + cost.shared_flops * count["shared_run"],
    )
