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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
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
        self.turns = Turns()  # the registry makes entries of one compiled model share theirs
        self.counters = Counters(costs[0], costs[1])
        self._names = tuple(s.name for s in plan.layout.specs)
        self._scratch = plan.scratch
        self._rows: dict[tuple[int, str], list[Tensor]] = {}
        self._counts = self._budget_counts() if options.budget is not None else []
        self._weights: WeightVersion | None = None
        self._turn: int | None = None
        self.calls = 0
        self._told_training = False
        # Dynamo may keep compiled code, hence this object, long after the model is gone
        self._root = weakref.ref(root, lambda _: self.reset()) if root is not None else None
        self._cached = bool(plan.layers) and options.interval > 1

    @property
    def cache_bytes(self) -> int:
        """Bytes one lane takes, known before any is allocated."""
        return self.variants.analysis.plan.layout.nbytes if self._cached else 0

    def __call__(self, *args: Any) -> Sequence[Any]:
        self.calls += 1
        tensors = [args[p] for p in self.positions]
        training = self._training()
        if not self._cached or training:
            outputs = self.variants.get("plain")(*tensors)
            self.counters.ran(TRAINING if training else NO_LAYERS)
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
        self.counters.reset()
        self.release()

    def release(self) -> None:
        """Free the rows of all lanes; what was counted stays."""
        self.store.reset()
        self.ages.forget()
        self._rows.clear()

    def _place(self, tensors: list[Tensor]) -> StepInfo:
        roles = self.roles
        weights = [tensors[i] for i in roles.weights]
        if self._weights is None:
            self._weights = WeightVersion(weights)
        elif self._weights.changed(weights):
            self.tracker.invalidate("weights_changed")
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
        self.store.free(lane)
        self.ages.forget(lane)
        for key in [k for k in self._rows if k[0] == lane]:
            del self._rows[key]
