"""One candidate in a process of its own: memory, caches and patches of one are no other's.

    parent                                worker
    Job  ------------------------------>  build, compile, one generation      -> Ready
    "generation"  --------------------->  the same calls again                -> Generation
    "finish"  ------------------------->  what was counted meanwhile          -> Finished

Whatever is raised goes to the parent as text. Between two messages a worker sleeps.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import moeca_compile

from ..passes.count_flops import FORMULAS
from ..runtime.registry import REGISTRY
from ..torch_compat import without_kernels
from .candidates import EAGER, INDUCTOR, PEER, Candidate
from .memory import Peak
from .workload import Call, Sizes, Workload, load

GENERATION, FINISH = "generation", "finish"
KINDS = ("refresh", "reuse", "forecast", "skip", "plain")


@dataclass(frozen=True)
class Job:
    """What one worker does. kernels: False runs graphs as they are, for a check of the set-up.

    cache_dir: of Inductor; a second worker with the same one starts warm.
    """

    model: str
    candidate: Candidate
    sizes: Sizes
    cache_dir: str
    mode: str | None = None
    threads: int | None = None
    kernels: bool = True


@dataclass(frozen=True)
class Ready:
    """After the first generation. first_s: its seconds, compiling included."""

    first_s: float
    steps: int


@dataclass(frozen=True)
class Generation:
    """Milliseconds of every step; kinds: what each turned out to be ("full" if not cached)."""

    kinds: list[str]
    wall_ms: list[float]
    cpu_ms: list[float]
    computed: float = 1.0  # share of the branches of reuse steps


@dataclass(frozen=True)
class Finished:
    """flops, flops_full: of one generation, as counted and without caching. peak_bytes: while
    generating; peak_bytes_all: compiling included."""

    flops: float | None
    flops_full: float | None
    cache_bytes: int
    peak_bytes: int
    peak_bytes_all: int
    threads: int
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Failed:
    """Why there is no figure."""

    reason: str


def serve(connection: Any, job: Job) -> None:
    """The worker's main function."""
    os.dup2(2, 1)  # stdout is the command's result
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = job.cache_dir
    if job.threads:
        torch.set_num_threads(job.threads)
    try:
        with nullcontext() if job.kernels else without_kernels():
            runner = Runner(job)
            connection.send(runner.warm_up())
            while (message := connection.recv()) is not None:
                verb, options = message
                connection.send(runner.finish() if verb == FINISH else runner.generation(options))
    except (EOFError, KeyboardInterrupt):
        return  # the parent is gone
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        connection.send(Failed(f"{type(error).__name__}: {lines[0]}"))


class Runner:
    """Holds the compiled model and counts."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.workload: Workload = load(job.model, job.sizes)
        self.device = torch.device(job.sizes.device)
        self.peak = Peak(self.device)
        self.run = self._compiled(self.workload.model)
        self.generations = 0
        self.cache_bytes = 0
        self.flops: float | None = None
        self.flops_full: float | None = None

    def _compiled(self, model: nn.Module) -> Callable[..., Any]:
        candidate, mode = self.job.candidate, self.job.mode
        if candidate.kind == EAGER:
            return model
        if candidate.kind == PEER:
            return self.workload.peers[candidate.name](model)
        if candidate.kind == INDUCTOR:
            return torch.compile(model, mode=mode) if self.job.kernels else model
        return torch.compile(model, backend="moeca", options=self._options())

    def _options(self) -> dict[str, Any]:
        """With torch.compile's mode among them: it takes no options beside its own argument."""
        mode = {"mode": self.job.mode} if self.job.mode else {}
        return {**self.job.candidate.options, **mode}

    def warm_up(self) -> Ready:
        """The first generation, which compiles what there is to compile."""
        if self.job.candidate.kind == EAGER:
            self._count_eager(self.workload.calls[0])
        started = time.perf_counter()
        self.generation(None)
        seconds = time.perf_counter() - started
        self.peak.begin()
        return Ready(seconds, len(self.workload.calls))

    @torch.no_grad()
    def _count_eager(self, call: Call) -> None:
        """Arithmetic of the model as it is: of one call, which is that of every call."""
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            self.run(*call[0], **call[1])
        self.flops = self.flops_full = counter.get_total_flops() * len(self.workload.calls)

    @torch.no_grad()
    def generation(self, options: dict[str, Any] | None) -> Generation:
        """All calls once. options: go on with these, which have to need no other graph."""
        cached = self.job.candidate.cached
        if options is not None:
            self._steer(options)
        before = moeca_compile.stats(self.run) if cached else None
        kinds, wall, cpu = [], [], []
        with ExitStack() as stack:
            if cached:
                stack.enter_context(moeca_compile.generation(self.run))
            for args, kwargs in self.workload.calls:
                kind, wall_ms, cpu_ms = self._step(args, kwargs, cached)
                kinds.append(kind)
                wall.append(wall_ms)
                cpu.append(cpu_ms)
        computed = self._note(before, kinds) if before is not None else 1.0
        self.generations += 1
        return Generation(kinds, wall, cpu, computed)

    def _step(self, args: Any, kwargs: Any, cached: bool) -> tuple[str, float, float]:
        before = moeca_compile.stats(self.run) if cached else None
        started, cpu_started = time.perf_counter(), time.process_time()
        self.run(*args, **kwargs)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        wall_ms = 1e3 * (time.perf_counter() - started)
        cpu_ms = 1e3 * (time.process_time() - cpu_started)
        if before is None:
            return "full", wall_ms, cpu_ms
        after = moeca_compile.stats(self.run)
        moved = [k for k in KINDS if _steps(after, k) > _steps(before, k)]
        return moved[0] if moved else "not seen", wall_ms, cpu_ms  # a step in fragments

    def _note(self, before: Any, kinds: list[str]) -> float:
        """Counts of this generation; the share of branches its reuse steps computed."""
        after = moeca_compile.stats(self.run)
        self.flops = after.flops_computed - before.flops_computed
        self.flops_full = after.flops_full - before.flops_full
        self.cache_bytes = after.cache_bytes
        branches = after.branches_total - before.branches_total
        if not branches or "reuse" not in kinds:
            return 1.0
        a_step = branches / sum(k != "not seen" for k in kinds)
        spent = after.branches_computed - before.branches_computed
        whole = a_step * sum(k in ("refresh", "plain") for k in kinds)
        return (spent - whole) / (a_step * kinds.count("reuse"))

    def _steer(self, options: dict[str, Any]) -> None:
        parsed = moeca_compile.Options.parse({**self._options(), **options})
        for entry in REGISTRY.entries_of(self.run):
            entry.steer(parsed)

    def finish(self) -> Finished:
        """Counts of the last generation, and memory."""
        notes = []
        if self.job.candidate.cached and not REGISTRY.entries_of(self.run):
            notes.append("nothing was cached: plain Inductor ran")
        return Finished(
            self.flops,
            self.flops_full,
            self.cache_bytes,
            *self.peak.read(),
            threads=torch.get_num_threads(),
            notes=notes,
        )


def _steps(stats: Any, kind: str) -> int:
    return getattr(stats, f"{kind}_steps")
