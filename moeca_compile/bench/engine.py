"""Runs candidates: every seed with the same compiled model, what ran counted by the backend.

with Engine(subject, Run("inductor", samples=64)) as engine:
    full = engine.reference("euler", seed=0)
    for made in engine.generations("euler", candidate, seeds):
        made.images, made.calls, made.stats, made.seconds

Engines:  inductor  as a user has it; the time of a generation after the first is worth reading
          graph     graphs run as they are: same arithmetic, images and counts, no kernels, no times

Compiling costs more than a generation, and most options only say which graph runs when: candidates
and samplers that the same graphs serve share one compiled model, steered anew for each generation.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..api import generation, stats
from ..calibration.measure import graph_key
from ..capture import prepare
from ..errors import MoecaError
from ..options import Options
from ..runtime.registry import REGISTRY
from ..runtime.stats import Stats
from ..torch_compat import raise_recompile_limit, without_kernels
from .candidates import Candidate
from .subject import Counted, Sampling, Subject, first_call

INDUCTOR, GRAPH = "inductor", "graph"
ENGINES = (INDUCTOR, GRAPH)
UNCACHED = Options(interval=1)


@dataclass(frozen=True)
class Run:
    """What all candidates of a run have in common. on_call: after every call of a model."""

    engine: str
    samples: int
    on_call: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Generation:
    """One generation. seconds: wall time; warm: nothing was compiled during it.

    stats: of the backend, None where it had no part in it.
    """

    seed: int
    images: Tensor
    calls: int
    seconds: float
    warm: bool
    stats: Stats | None

    def speedup(self, full_calls: int) -> float:
        """FLOPs of `full_calls` uncached calls over those spent here, counted from what ran.

        Calls that the backend did not see count in full. Raises MoecaError if it saw none.
        """
        if self.stats is None:
            return full_calls / self.calls
        if not self.stats.steps:
            raise MoecaError(f"none of {self.calls} calls went through the cache; see `explain`")
        one = self.stats.flops_full / self.stats.steps
        unseen = self.calls - self.stats.steps
        return full_calls * one / (self.stats.flops_computed + unseen * one)


@dataclass
class Engine:
    """A context: compiled models of one subject live in it; outside, nothing stays compiled."""

    subject: Subject
    run: Run
    _made: Sampling | None = None
    _compiled: dict[Hashable, Any] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Engine:
        torch.compiler.reset()
        self._stack.callback(self._forget)
        self._stack.callback(raise_recompile_limit())
        if self.run.engine == GRAPH:
            self._stack.enter_context(without_kernels())
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def reference(self, sampler: str, seed: int) -> Generation:
        """The model as it is, eager: what every candidate is compared with."""
        first = self.subject.first
        steps = self.subject.steps_of(sampler)
        return _generate(first, first.model, sampler, steps, seed, self.run)

    def generations(
        self, sampler: str, candidate: Candidate, seeds: Sequence[int]
    ) -> Iterator[Generation]:
        """One generation per seed. Raises whatever compiling or sampling raises."""
        steps = candidate.steps or self.subject.steps_of(sampler)
        if candidate.options is None and self.run.engine == GRAPH:
            first = self.subject.first
            for seed in seeds:
                yield _generate(first, first.model, sampler, steps, seed, self.run)
            return
        options = UNCACHED if candidate.options is None else Options.parse(candidate.options)
        key = graph_key(options) if options.interval > 1 else None
        try:
            yield from self._cached(key, sampler, steps, seeds, options)
        except BaseException:
            self._compiled.pop(key, None)  # half compiled, perhaps
            raise

    def _cached(
        self, key: Hashable, sampler: str, steps: int, seeds: Sequence[int], options: Options
    ) -> Iterator[Generation]:
        made, compiled = self._prepared(sampler, steps, key, options)

        def once(seed: int) -> Generation:
            # The run knows where a generation begins: steps of a sampler that adds much noise need
            # not prove that they continue one.
            steered = REGISTRY.attached(compiled, lambda entry: entry.steer(options))
            with steered, generation(compiled):
                one = _generate(made, compiled, sampler, steps, seed, self.run)
            return replace(one, stats=stats(compiled))

        for index, seed in enumerate(seeds):
            one = replace(once(seed), warm=index > 0)
            if self.run.engine == INDUCTOR and len(seeds) == 1:
                one = replace(one, seconds=once(seed).seconds, warm=True)
            yield one

    @torch.no_grad()
    def _prepared(
        self, sampler: str, steps: int, key: Hashable, options: Options
    ) -> tuple[Sampling, Any]:
        """The model captured ahead, else its first call is one of fragments; and it compiled."""
        if self._made is None:
            self._made = self.subject.make()
            args, kwargs = first_call(self._made, sampler, self.run.samples, steps)
            prepare(self._made.model, *args, **kwargs)
        if key not in self._compiled:
            given = {k: v for k, v in options.to_dict().items() if v is not None}
            self._compiled[key] = torch.compile(self._made.model, backend="moeca", options=given)
        return self._made, self._compiled[key]

    def _forget(self) -> None:
        self._compiled.clear()
        self._made = None
        torch.compiler.reset()
        gc.collect()


@torch.no_grad()
def _generate(
    made: Sampling, model: Any, sampler: str, steps: int, seed: int, run: Run
) -> Generation:
    counted = Counted(model, run.on_call)
    started = time.perf_counter()
    images = made.sample(counted, sampler, seed, run.samples, steps)
    seconds = time.perf_counter() - started
    if len(images) != run.samples:
        raise MoecaError(f"sample() returned {len(images)} images; expected {run.samples}")
    return Generation(seed, images.detach(), counted.calls, seconds, True, None)
