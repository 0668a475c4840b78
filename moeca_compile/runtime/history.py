"""What every step did, one by one: the memory behind the run report. Off unless asked for.

    with moeca_compile.record(compiled):   entry.history = History(plan, options)
        sampler(compiled)                  a StepRecord a step, tensors left on their device
    moeca_compile.report(compiled, path)   one read, at the end

What a step computed is read off the rows it wrote: a branch whose cached norm is another one than
before was computed. Recording keeps a second copy of norms and expert inputs per lane; a step that
is not recorded pays for one comparison with None.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..lowering.guards import EPS, chosen_thresholds
from ..options import Options
from ..policies.protocol import Decision
from .telemetry import FIELDS

if TYPE_CHECKING:
    from ..passes.cache_plan import CachePlan, LayerPlan
    from .session import StepInfo

MAX_STEPS = 1024  # of one entry; older ones are forgotten and counted
EXPERT_FIELDS = ("entropy", "threshold", "computed", "branches")


@dataclass(frozen=True)
class StepRecord:
    """One call. place: None for a call that no lane was looked up for (training mode, no layer).

    counts: int64 [layers, FIELDS] of a reuse step. drift: float32 [layers], mean relative change of
    the cached rows that were rewritten, NaN where there is nothing to compare. experts: float32
    [EXPERT_FIELDS, experts of all layers]. Tensors stay on their device until they are read.
    evidence: what the policy held against going on, see `Policy.evidence`.
    """

    decision: Decision
    place: StepInfo | None
    evidence: float | None = None
    counts: Tensor | None = None
    drift: Tensor | None = None
    experts: Tensor | None = None


class History:
    """The last MAX_STEPS steps of one entry. recording: whether new ones are taken up."""

    def __init__(self, plan: CachePlan, options: Options) -> None:
        self.layers = plan.layers
        self.options = options
        self.recording = True
        self.clear()

    def clear(self) -> None:
        """Forget all steps."""
        self.steps: deque[StepRecord] = deque(maxlen=MAX_STEPS)
        self.forgotten = 0
        self._before: dict[int, dict[str, Tensor]] = {}

    def ran(
        self,
        decision: Decision,
        place: StepInfo | None = None,
        counts: Tensor | None = None,
        rows: dict[str, Tensor] | None = None,
        evidence: float | None = None,
    ) -> None:
        """Take up one step after its variant returned. rows: the lane's caches by name.

        Reads no value, so it waits for no device.
        """
        if not self.recording:
            return
        self.forgotten += len(self.steps) == MAX_STEPS
        # Policies that forecast whole outputs keep no rows.
        if place is None or rows is None or not self._has_rows(rows):
            self.steps.append(StepRecord(decision, place, evidence))
            return
        # Inference tensors could not be compared or written outside inference mode.
        with torch.inference_mode(False), torch.no_grad():
            kept = None if counts is None else counts.clone()
            measured = self._measured(decision, place, kept, rows)
            self.steps.append(replace(measured, evidence=evidence))

    def _has_rows(self, rows: dict[str, Tensor]) -> bool:
        return bool(self.layers) and self.layers[0].name("slot_norm") in rows

    def evicted(self, lane: int) -> None:
        """The lane's rows are gone."""
        self._before.pop(lane, None)

    def _measured(
        self, decision: Decision, place: StepInfo, counts: Tensor | None, rows: dict[str, Tensor]
    ) -> StepRecord:
        before = {} if place.new_generation else self._before.get(place.lane, {})
        watched = [name for layer in self.layers for name in _watched(layer, rows)]
        drift = torch.stack([_drift(layer, rows, before) for layer in self.layers])
        experts = [self._experts(decision, layer, rows, before) for layer in self.layers]
        self._before[place.lane] = {name: rows[name].clone() for name in watched}
        return StepRecord(
            decision, place, counts=counts, drift=drift, experts=torch.cat(experts, 1)
        )

    def _experts(
        self, decision: Decision, layer: LayerPlan, rows: dict[str, Tensor], before: dict
    ) -> Tensor:
        """[EXPERT_FIELDS, E] of one layer."""
        spatial, ids = rows[layer.name("spatial")], rows[layer.name("slot_ids")]
        options = self.options
        # The step has updated the statistic already; beta = 1 reads it as it is.
        unchosen = spatial.new_zeros(spatial.t().shape, dtype=torch.bool)
        alpha = options.alpha if layer.selector.expert_aware else 0.0
        _, limits = chosen_thresholds(spatial, unchosen, options.tau, alpha, 1.0)
        p = spatial / spatial.sum(1, keepdim=True).clamp(min=EPS)
        entropy = -(p * p.clamp(min=EPS).log()).sum(1)
        norm = rows[layer.name("slot_norm")]
        old = before.get(layer.name("slot_norm"))
        full = decision.kind == "refresh" or old is None
        computed = torch.ones_like(norm) if full else (norm != old).to(norm.dtype)
        flat, zero = ids.reshape(-1).long(), torch.zeros_like(limits)
        held = (flat >= 0).to(zero.dtype)
        expert = layer.region.expert_of(flat).clamp(min=0)
        ran = zero.index_add(0, expert, computed[: len(flat)].to(zero.dtype) * held)
        total = zero.index_add(0, expert, held)
        return torch.stack([entropy, limits, ran, total])


def _watched(layer: LayerPlan, rows: dict[str, Tensor]) -> tuple[str, str]:
    """Caches of which the state before a step is kept: norms, and what the drift is read off."""
    inputs = layer.name("token_in0")
    return layer.name("slot_norm"), inputs if inputs in rows else layer.name("slot_out")


def _drift(layer: LayerPlan, rows: dict[str, Tensor], before: dict[str, Tensor]) -> Tensor:
    """Mean over rewritten rows of |new - old| / |old|: a scalar, NaN without a row to compare."""
    _, name = _watched(layer, rows)
    new, old = rows[name][:-1].float(), before.get(name)
    if old is None:
        return torch.full((), float("nan"), device=new.device)
    size = old[:-1].float().norm(dim=-1)
    moved = (new - old[:-1].float()).norm(dim=-1) / size.clamp(min=EPS)
    rewritten = (moved > 0) & (size > 0)
    return torch.where(rewritten, moved, 0.0).sum() / rewritten.sum()


def counted(record: StepRecord) -> list[dict[str, int]]:
    """The counts of a reuse step by name, a dict per layer. Waits for the device."""
    if record.counts is None:
        return []
    return [dict(zip(FIELDS, line)) for line in record.counts.tolist()]
