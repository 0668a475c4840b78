"""One compiled denoiser at run time: place the call, pick the variant, hand it the lane's rows.

    entry(*inputs)  ->  tracker: lane, step   controller: refresh / reuse   variant(*inputs, *rows)

An entry serves one set of input shapes. Nothing here touches a device: a step costs the host some
tens of microseconds (benchmarks/reuse_step.py measures it).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..lowering.variants import Variants
from ..options import Options
from ..passes.reuse_inputs import allowed_counts
from ..policies.protocol import Decision
from .controller import Controller, LaneAges
from .history import History
from .inputs import InputRoles
from .session import SessionTracker, StepInfo
from .stats import Costs, Stats
from .store import CacheStore
from .telemetry import Counters
from .turns import ELSEWHERE, Turns
from .weights import WeightVersion

log = logging.getLogger(__name__)
TRAINING = Decision("plain", "training_mode")
NO_LAYERS = Decision("plain", "no_moe_layer_matched")


class CompiledEntry:
    """Runs the variants of one analysed graph. Not thread-safe: one sampling loop at a time."""

    def __init__(
        self,
        variants: Variants,
        options: Options,
        roles: InputRoles,
        costs: Callable[[], Costs],
        root: nn.Module | None,
    ):
        plan = variants.analysis.plan
        self.variants = variants
        self.options = options
        self.roles = roles
        self.positions = [i.position for i in variants.analysis.aten.inputs]
        self.store = CacheStore(plan.layout)
        self.tracker = SessionTracker(on_evict=self._evict)
        self.controller = Controller(options, plan.variants)
        self.ages = LaneAges()
        self.turns = Turns()  # the registry makes entries of one compiled model share theirs
        self.counters = Counters([each.region.open_ended for each in plan.layers], costs)
        self.history: History | None = None  # set while someone records
        self._names = tuple(s.name for s in plan.layout.specs)
        self._scratch = plan.scratch
        self._rows: dict[tuple[int, str], list[Tensor]] = {}
        self._counts = self._budget_counts()
        self._measured: dict[int, Tensor] = {}  # by lane: read at its next call, not before
        self._weights: WeightVersion | None = None
        self._turn: int | None = None
        self.calls = 0
        self._told_training = False
        # Dynamo may keep compiled code, hence this object, long after the model is gone
        self._root = weakref.ref(root, lambda _: self.reset()) if root is not None else None
        self._cached = bool(plan.variants) and options.interval > 1

    @property
    def cache_bytes(self) -> int:
        """Bytes one lane takes, known before any is allocated."""
        return self.variants.analysis.plan.layout.nbytes if self._cached else 0

    def __call__(self, *args: Any) -> Sequence[Any]:
        self.calls += 1
        tensors = [args[p] for p in self.positions]
        training = self._training()
        if not self._cached or training:
            outputs, counts = self._counted("plain", self.variants.get("plain")(*tensors))
            self._count(TRAINING if training else NO_LAYERS, counts)
            return outputs
        step = self._place(tensors)
        age = self.ages.started(step.lane)
        self._measure(step, tensors)
        decision = self.controller.decide(step, age)
        # asked before the step runs: a refresh starts the evidence anew
        evidence = self.controller.policy.evidence(step.lane) if self.history is not None else None
        outputs, counts = self._run(decision, step, tensors)
        self.ages.ran(step.lane, decision.kind, age)
        self._count(decision, counts, step, evidence)
        return outputs

    def _count(
        self,
        decision: Decision,
        counts: Tensor | None = None,
        step: StepInfo | None = None,
        evidence: float | None = None,
    ) -> None:
        self.counters.ran(decision, counts)
        if self.history is not None:
            rows_kept = self.variants.analysis.plan.stored.rows
            held = rows_kept and step is not None and step.lane in self.store.lanes
            rows = self.store.tensors(step.lane) if step is not None and held else None
            self.history.ran(
                decision, step, counts if decision.kind == "reuse" else None, rows, evidence
            )

    def stats(self) -> Stats:
        """Everything counted since the last reset."""
        counted = self.counters.stats(
            cache_bytes=self.store.nbytes,
            generations=self.tracker.generations,
            lanes=self.tracker.lanes,
        )
        left_out = self.variants.analysis.plan.left_out
        return replace(counted, left_out=tuple(region.name for region in left_out))

    def reset(self) -> None:
        """Forget rows, lanes and counts; compiled variants stay."""
        self.tracker.reset()
        self.counters.reset()
        if self.history is not None:
            self.history.clear()
        self.release()

    def steer(self, options: Options) -> None:
        """Go on with other options that the same graphs serve; rows and counts are forgotten.

        Which options those are: calibration/measure.py, `graph_key`.
        """
        plan = self.variants.analysis.plan
        self.options = options
        self.variants.steer(options)
        self.controller = Controller(options, plan.variants)
        self._counts = self._budget_counts()
        self._cached = bool(plan.variants) and options.interval > 1
        self.reset()

    def release(self) -> None:
        """Free the rows of all lanes, and what was made of weights; what was counted stays."""
        self.store.reset()
        self.variants.stacks.release()
        self.ages.forget()
        self.controller.policy.forget()
        self._measured.clear()
        self._rows.clear()

    def _place(self, tensors: list[Tensor]) -> StepInfo:
        roles = self.roles
        weights = [tensors[i] for i in roles.weights]
        if self._weights is None:
            self._weights = WeightVersion(weights)
        elif self._weights.changed(weights):
            self.tracker.invalidate("weights_changed")
            self.variants.stacks.renew(tensors)
        step = self.tracker.observe(
            None if roles.timestep is None else tensors[roles.timestep],
            [tensors[i] for i in roles.conditioning],
            None if roles.sample is None else tensors[roles.sample],
        )
        before, self._turn = self._turn, self.turns.at(step.timestep)
        if before is not None and self._turn > before + 1 and not step.fresh:
            return replace(step, fresh=True, reason=ELSEWHERE)
        return step

    def _run(
        self, decision: Decision, step: StepInfo, tensors: list[Tensor]
    ) -> tuple[Sequence[Any], Tensor | None]:
        variant = self.variants.get(decision.kind)
        if decision.kind == "plain":
            return self._counted("plain", variant(*tensors))
        if step.new_generation:
            self.store.refill(step.lane, "spatial")
            self.variants.stacks.renew(tensors)
        rows = self._lane_rows(step.lane, decision.kind)
        counts = self._counts if decision.kind == "reuse" else []
        stacked = self.variants.stacks.values(decision.kind, tensors)
        outputs = variant(*tensors, *rows, *counts, *self._mix(decision, step), *stacked)
        if self.variants.analysis.plan.measures(decision.kind):
            *outputs, measured = outputs
            self._measured[step.lane] = measured.clone()  # CUDA graphs reuse their outputs' memory
        return self._counted(decision.kind, outputs)

    def _counted(self, kind: str, outputs: Sequence[Any]) -> tuple[Sequence[Any], Tensor | None]:
        """What a step returned, without the counts behind it where there are any."""
        if kind not in self.variants.analysis.plan.counted:
            return outputs, None
        *outputs, counts = outputs
        return outputs, counts

    def _mix(self, decision: Decision, step: StepInfo) -> list[Tensor]:
        """What the policy says of this step, as the variant's last input."""
        mix = self.controller.policy.mix(step, decision.kind)
        wanted = self.variants.mixed(decision.kind)
        if not wanted:
            return []
        return [torch.tensor(mix, dtype=torch.float32, device=self.variants.analysis.plan.device)]

    def _measure(self, step: StepInfo, tensors: list[Tensor]) -> None:
        """Tell the policy what the lane's last step found; one small read of the device."""
        policy = self.controller.policy
        measured = self._measured.pop(step.lane, None)
        if measured is not None and not step.fresh:
            policy.measured(step.lane, measured.tolist())
        if policy.probes and self.variants.analysis.plan.histories.input is not None:
            probe = self.variants.get("probe")
            stacked = self.variants.stacks.values("probe", tensors)
            (drift,) = probe(*tensors, *self._lane_rows(step.lane, "probe"), *stacked)
            policy.probed(step.lane, drift.tolist())

    def _lane_rows(self, lane: int, kind: str) -> list[Tensor]:
        """The lane's caches in order; a refresh writes whole tensors, without the padding row."""
        found = self._rows.get((lane, kind))
        if found is None:
            tensors = self.store.tensors(lane)
            cut = self._scratch if kind == "refresh" else frozenset()
            found = [tensors[n][:-1] if n in cut else tensors[n] for n in self._names]
            self._rows[lane, kind] = found
        return found

    def _budget_counts(self) -> list[Tensor]:
        """What the budget allows, the graph's CPU input [layers, 3]; none where it has none."""
        if not self.variants.counts("reuse"):
            return []
        assert self.options.budget is not None
        allowed = allowed_counts(self.variants.analysis.plan.layers, self.options.budget)
        return [torch.tensor(allowed, dtype=torch.int64)]

    def _training(self) -> bool:
        """Whether the model is in training mode. Says so once; with `strict` UnsupportedError."""
        root = self._root() if self._root is not None else None
        if root is None or not root.training:
            return False
        message = "not cached: the model is in training mode; call model.eval() before sampling"
        if self.options.strict:
            raise UnsupportedError(f"strict=True: {message}")
        if not self._told_training:
            log.warning(message)
            self._told_training = True
        return True

    def _evict(self, lane: int) -> None:
        self.store.retire(lane)
        self.ages.forget(lane)
        self.controller.policy.forget(lane)
        self._measured.pop(lane, None)
        if self.history is not None:
            self.history.evicted(lane)
        for key in [k for k in self._rows if k[0] == lane]:
            del self._rows[key]
