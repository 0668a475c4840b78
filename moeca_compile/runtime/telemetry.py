"""What ran, counted from what ran: every reuse graph hands back its own counts.

    reuse graph -> int64 [layers, len(FIELDS)]  --add_, on its device, no host sync-->  [L, F]
    Counters.stats() -> one read, folded with the steps into a frozen Stats (report.py)

Refresh and plain steps compute everything and count in full; forecast and skipped ones no row. Sums
are kept, not the tensors themselves: under CUDA graphs the next replay overwrites them, and memory
stays bounded.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from moeca_compile.policies.protocol import Decision, Kind
from moeca_compile.runtime.stats import Costs, LayerCost, LayerStats, Stats

# attention_run, shared_run: rows really computed, padding included. branches: asked for in this
# step, counted only where their number depends on the data.
FIELDS = (
    "branches_computed",
    "tokens_attended",
    "unmatched",
    "dropped",
    "shared_rows",
    "attention_run",
    "shared_run",
    "branches",
)
MAX_EVENTS = 256


class Counters:
    """Running totals of one compiled entry.

    open_ended: per MoE layer, in the row order of what reuse graphs return, whether its number of
    branches depends on the data. costs: what the graph's FLOPs are, asked for when somebody first
    reads the totals: counting them takes some 60 ms a layer.
    """

    def __init__(self, open_ended: Sequence[bool], costs: Callable[[], Costs]) -> None:
        self._open_ended = tuple(open_ended)
        self._count_costs = costs
        self.reset()

    @cached_property
    def costs(self) -> Costs:
        """FLOPs of the graph and of its layers' rows."""
        return self._count_costs()

    def reset(self) -> None:
        """Start counting at zero."""
        self._steps: Counter[Kind] = Counter()
        self._reasons: Counter[str] = Counter()
        self._events: deque[str] = deque(maxlen=MAX_EVENTS)
        self._sums: dict[torch.device, Tensor] = {}

    def ran(self, decision: Decision, counts: Tensor | None = None) -> None:
        """Count one step after its variant returned.

        counts: int64 [layers, len(FIELDS)] from the graph, required for "reuse" and, if a layer's
        number of branches depends on the data, for steps that compute everything; for these only.
        Raises ValueError for another shape or dtype; reads no value.
        """
        full = decision.kind in ("plain", "refresh") and any(self._open_ended)
        if (counts is not None) != (decision.kind == "reuse" or full):
            raise ValueError(f"counters: counts go with reuse steps only, got {decision.kind!r}")
        if counts is not None:
            self._add(counts)
        self._steps[decision.kind] += 1
        if decision.kind == "refresh":
            self._reasons[decision.reason] += 1

    def event(self, text: str) -> None:
        """Note something worth reading later; the last MAX_EVENTS are kept."""
        self._events.append(text)

    def stats(self, *, cache_bytes: int = 0, generations: int = 0, lanes: int = 0) -> Stats:
        """Everything counted so far; the only place that waits for the device."""
        folded, costs = self._fold(), self.costs
        steps = self._steps
        full_steps = steps["plain"] + steps["refresh"]
        computed = full_steps + steps["reuse"]
        rows = tuple(
            _layer_stats(cost, full_steps, steps.total(), counted)
            for cost, counted in zip(costs.layers, folded)
        )
        return Stats(
            plain_steps=steps["plain"],
            refresh_steps=steps["refresh"],
            reuse_steps=steps["reuse"],
            forecast_steps=steps["forecast"],
            skip_steps=steps["skip"],
            layers=rows,
            fixed_flops_full=costs.fixed * steps.total(),
            fixed_flops=costs.fixed * computed + costs.forecast * steps["forecast"],
            cache_bytes=cache_bytes,
            generations=generations,
            lanes=lanes,
            reasons=Counter(self._reasons),
            events=tuple(self._events),
        )

    def _add(self, counts: Tensor) -> None:
        expected = (len(self._open_ended), len(FIELDS))
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
        folded = torch.zeros(len(self._open_ended), len(FIELDS), dtype=torch.int64)
        for total in self._sums.values():
            folded += total.cpu()
        return folded.tolist()


def _layer_stats(cost: LayerCost, full: int, steps: int, counted: Sequence[int]) -> LayerStats:
    """full: steps that computed every row, of all `steps`."""
    count = dict(zip(FIELDS, counted))
    known = 0 if cost.open_ended else cost.branches
    branches = known * steps + count["branches"]
    computed = known * full + count["branches_computed"]
    per_token = cost.token_flops + cost.shared_flops
    return LayerStats(
        name=cost.name,
        branches_total=branches,
        branches_computed=computed,
        tokens_total=cost.tokens * steps,
        tokens_attended=cost.tokens * full + count["tokens_attended"],
        shared_rows=cost.shared_rows * full + count["shared_rows"],
        unmatched=count["unmatched"],
        dropped=count["dropped"],
        flops_full=cost.branch_flops * branches + cost.tokens * per_token * steps,
        flops_computed=cost.branch_flops * computed
        + cost.tokens * per_token * full
        + cost.token_flops * count["attention_run"]
        + cost.shared_flops * count["shared_run"],
    )
