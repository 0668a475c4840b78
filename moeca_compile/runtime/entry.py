"""One compiled denoiser at run time: place the call, pick the variant, hand it the lane's rows.

    entry(*inputs)  ->  tracker: lane, step   controller: refresh / reuse   variant(*inputs, *rows)

An entry serves one set of input shapes. Nothing here touches a device: a step costs the host some
tens of microseconds (benchmarks/reuse_step.py measures it).
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..lowering.variants import Variants
from ..options import Options
from ..passes.reuse_layer import MIN_ROWS
from ..policies.protocol import Decision
from .controller import Controller, LaneAges
from .inputs import InputRoles
from .session import SessionTracker, StepInfo
from .stats import LayerCost, Stats
from .store import CacheStore
from .telemetry import Counters
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
        costs: tuple[list[LayerCost], int],
        root: nn.Module | None,
    ):
        plan = variants.analysis.plan
        self.variants = variants
        self.options = options
        self.roles = roles
        self.positions = [i.position for i in variants.analysis.aten.inputs]
        self.store = CacheStore(plan.layout)
        self.tracker = SessionTracker(on_evict=self._evict)
        self.controller = Controller(options)
        self.ages = LaneAges()
        self.counters = Counters(costs[0], costs[1])
        self._names = tuple(s.name for s in plan.layout.specs)
        self._scratch = plan.scratch
        self._rows: dict[tuple[int, str], list[Tensor]] = {}
        self._counts = self._budget_counts() if options.budget is not None else []
        self._weights: WeightVersion | None = None
        self._root = weakref.ref(root) if root is not None else None
        self._cached = bool(plan.layers) and options.interval > 1

    @property
    def cache_bytes(self) -> int:
        """Bytes one lane takes, known before any is allocated."""
        return self.variants.analysis.plan.layout.nbytes if self._cached else 0

    def __call__(self, *args: Any) -> Sequence[Any]:
        tensors = [args[p] for p in self.positions]
        if not self._cached or self._training():
            decision = TRAINING if self._cached else NO_LAYERS
            outputs = self.variants.get("plain")(*tensors)
            self.counters.ran(decision)
            return outputs
        step = self._place(tensors)
        age = self.ages.started(step.lane)
        decision = self.controller.decide(step, age)
        outputs, counts = self._run(decision, step, tensors)
        self.ages.ran(step.lane, decision.kind, age)
        self.counters.ran(decision, counts)
        return outputs

    def stats(self) -> Stats:
        """Everything counted since the last reset."""
        return self.counters.stats(
            cache_bytes=self.store.nbytes,
            generations=self.tracker.generations,
            lanes=self.tracker.lanes,
        )

    def reset(self) -> None:
        """Forget rows, lanes and counts; compiled variants stay."""
        self.tracker.reset()
        self.store.reset()
        self.ages.forget()
        self._rows.clear()
        self.counters.reset()

    def _place(self, tensors: list[Tensor]) -> StepInfo:
        roles = self.roles
        weights = [tensors[i] for i in roles.weights]
        if self._weights is None:
            self._weights = WeightVersion(weights)
        elif self._weights.changed(weights):
            self.tracker.invalidate("weights_changed")
        return self.tracker.observe(
            None if roles.timestep is None else tensors[roles.timestep],
            [tensors[i] for i in roles.conditioning],
            None if roles.sample is None else tensors[roles.sample],
        )

    def _run(
        self, decision: Decision, step: StepInfo, tensors: list[Tensor]
    ) -> tuple[Sequence[Any], Tensor | None]:
        variant = self.variants.get(decision.kind)
        if decision.kind == "plain":
            return variant(*tensors), None
        if step.new_generation:
            self.store.refill(step.lane, "spatial")
        rows = self._lane_rows(step.lane, decision.kind)
        if decision.kind == "refresh":
            return variant(*tensors, *rows), None
        *outputs, counts = variant(*tensors, *rows, *self._counts)
        return outputs, counts

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
        """Branches and tokens per sample that the budget allows: the graph's CPU input [layers, 2].

        At least two: smaller sizes would be specialised.
        """
        assert self.options.budget is not None
        allowed = []
        for layer in self.variants.analysis.plan.layers:
            samples = layer.region.space.samples
            sizes = (layer.branches // samples, layer.tokens // samples)
            budget = self.options.budget
            allowed.append([max(MIN_ROWS, math.ceil(budget * s - 1e-9)) for s in sizes])
        return [torch.tensor(allowed, dtype=torch.int64)]

    def _training(self) -> bool:
        root = self._root() if self._root is not None else None
        return root is not None and root.training

    def _evict(self, lane: int) -> None:
        self.store.free(lane)
        self.ages.forget(lane)
        for key in [k for k in self._rows if k[0] == lane]:
            del self._rows[key]
