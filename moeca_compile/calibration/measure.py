"""One generation with some options: its arithmetic against the uncached one, and its distance.

with Measure(model, generate) as measure:
    measure.reference(0)                          uncached, eager, once per seed
    measure.run({"policy": "fora"}, 0)            Tradeoff(speedup=2.9, psnr_db=37.1)

Compiling costs far more than a generation, and most options only say which variant runs when: all
settings that the same graphs serve share one compiled model (`graph_key`). For metric="flops"
graphs run without Inductor's kernels: the same arithmetic, the same images.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..api import stats
from ..bench.metrics import mean_squared_error, to_psnr
from ..capture import prepare
from ..errors import MoecaError
from ..options import Options
from ..policies import find_policy
from ..runtime.entry import CompiledEntry
from ..runtime.registry import REGISTRY
from ..torch_compat import map_leaves, raise_recompile_limit, without_kernels
from .target import Tradeoff

Generate = Callable[[Any, int], Tensor]
FLOPS, WALL = "flops", "wall"
METRICS = (FLOPS, WALL)
_IN_ROW_GRAPHS = (
    "score", "order", "tau", "alpha", "beta", "lambda_drift", "lambda_share", "cache_dtype",
    "max_cache_bytes", "compile_repeats",
)  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """The uncached generation of one seed. calls: of the model. seconds: wall time."""

    images: Tensor
    calls: int
    seconds: float


def graph_key(options: Options) -> Hashable:
    """What of the options is built into graphs; the rest `CompiledEntry.steer` changes."""
    stored = find_policy(options.policy).stores(options)
    if not stored.rows:
        return stored, options.timestep, options.max_cache_bytes, options.compile_repeats
    built_in = tuple(getattr(options, name) for name in _IN_ROW_GRAPHS)
    selector = find_policy(options.policy).selector(options)
    return stored, options.timestep, options.budget is None, selector, built_in


@dataclass
class Measure:
    """A context: compiled models of all settings live in it; outside, nothing stays compiled.

    metric: "flops" or "wall". peak: span of the values, for PSNR; None: found in the references.
    base: options that every setting has. seconds: of the slowest start and generation so far.
    """

    model: nn.Module
    generate: Generate
    metric: str = FLOPS
    peak: float | None = None
    base: dict[str, Any] = field(default_factory=dict)
    references: dict[int, Reference] = field(default_factory=dict)
    start_seconds: float = 0.0
    run_seconds: float = 0.0
    clock: Callable[[], float] = time.monotonic
    _compiled: dict[Hashable, Any] = field(default_factory=dict)
    _call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Measure:
        torch.compiler.reset()
        self._stack.callback(self._forget)
        self._stack.callback(raise_recompile_limit())
        self._stack.enter_context(torch.no_grad())
        if self.metric == FLOPS:
            self._stack.enter_context(without_kernels())
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def reference(self, seed: int) -> Reference:
        """The model as it is. Raises MoecaError if it is never called or returns no tensor."""
        if seed not in self.references:
            self.references[seed] = self._refer(seed)
        return self.references[seed]

    def _refer(self, seed: int) -> Reference:
        calls = 0

        def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal calls
            calls += 1
            if self._call is None:
                self._call = map_leaves(_copy, (args, kwargs))

        handle = self.model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            images, seconds = self._generate(self.model, seed)
        finally:
            handle.remove()
        if not calls:
            raise MoecaError("generate(model, seed) ended without calling the model it was given")
        if self.metric == WALL:  # against Inductor, not against eager
            seconds = self._timed(Options.parse(self.base, interval=1), seed)[1]
        return Reference(images, calls, seconds)

    def starts(self, options: dict[str, Any]) -> bool:
        """Whether a run with these options has to compile first."""
        return graph_key(Options.parse({**self.base, **options})) not in self._compiled

    def estimate(self, options: dict[str, Any]) -> float:
        """Seconds that one generation with these options may take."""
        known = self.run_seconds or max(r.seconds for r in self.references.values())
        return known + (self.start_seconds if self.starts(options) else 0.0)

    def reserve(self) -> float:
        """Seconds to keep back for a seed that was not used yet: its reference and one run."""
        return 2.0 * (self.run_seconds + max(r.seconds for r in self.references.values()))

    def run(self, options: dict[str, Any], seed: int) -> Tradeoff:
        """One generation against the reference of `seed`. Raises whatever compiling raises."""
        full = self.reference(seed)
        parsed = Options.parse({**self.base, **options})
        starts, began = self.starts(options), self.clock()
        images, seconds = self._timed(parsed, seed)
        whole = self.clock() - began
        if starts:
            self.start_seconds = max(self.start_seconds, whole)
        else:
            self.run_seconds = max(self.run_seconds, whole)
        counted = self._speedup(self._compiled[graph_key(parsed)], full)
        speedup = full.seconds / seconds if self.metric == WALL else counted
        return Tradeoff(speedup, to_psnr(mean_squared_error(full.images, images), self._peak()))

    def _timed(self, options: Options, seed: int) -> tuple[Tensor, float]:
        key = graph_key(options) if options.interval > 1 else "uncached"
        first = key not in self._compiled
        if first:
            self._prepare()
            given = {k: v for k, v in options.to_dict().items() if v is not None}
            self._compiled[key] = torch.compile(self.model, backend="moeca", options=given)
        compiled = self._compiled[key]

        def steer(entry: CompiledEntry) -> None:
            entry.steer(options)

        def once() -> tuple[Tensor, float]:
            with REGISTRY.attached(compiled, steer):
                return self._generate(compiled, seed)

        made = once()
        if self.metric == WALL:  # the first one may have compiled a variant, or been disturbed
            made = min(made, once(), key=lambda each: each[1])
        return made

    def _prepare(self) -> None:
        """Capture ahead, once: the first compiled call would be one of fragments."""
        if self._compiled:
            return
        assert self._call is not None, "a reference was run before"
        prepare(self.model, *self._call[0], **self._call[1])

    def _generate(self, model: Any, seed: int) -> tuple[Tensor, float]:
        began = self.clock()
        images = self.generate(model, seed)
        if not isinstance(images, Tensor):
            kind = type(images).__name__
            raise MoecaError(f"generate(model, seed): expected a Tensor, got {kind}")
        return images.detach().cpu(), self.clock() - began

    def _speedup(self, compiled: Any, full: Reference) -> float:
        """FLOPs of the uncached calls over those spent; calls that were not cached count in full.

        Raises MoecaError if none was.
        """
        ran = stats(compiled)
        if not ran.steps or not ran.flops_full:
            raise MoecaError("no call went through the cache; moeca_compile.explain says why")
        one = ran.flops_full / ran.steps
        unseen = max(0, full.calls - ran.steps)
        return full.calls * one / (ran.flops_computed + unseen * one)

    def _peak(self) -> float:
        if self.peak is None:
            values = [r.images for r in self.references.values()]
            span = max(v.max().item() for v in values) - min(v.min().item() for v in values)
            self.peak = span or 1.0
        return self.peak

    def _forget(self) -> None:
        self._compiled.clear()
        torch.compiler.reset()
        gc.collect()


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
