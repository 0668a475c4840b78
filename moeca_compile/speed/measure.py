"""Starts a worker for every candidate, compiles twice, lets them take turns.

cold   a process with an empty kernel cache: compile, one generation, end
warm   the next process with the same cache: what a second start of a program costs; it stays
turns  generation by generation, so that a disturbance of the machine hits all of them
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from .candidates import EAGER, PEER, Candidate
from .worker import FINISH, GENERATION, Failed, Finished, Generation, Job, Ready, serve
from .workload import Sizes


@dataclass(frozen=True)
class Plan:
    """A run. compile_twice: measure the cold start too. on_step: called as the work goes on."""

    model: str
    candidates: Sequence[Candidate]
    sizes: Sizes
    out: Path
    rounds: int = 3
    threads: int | None = None
    mode: str | None = None
    kernels: bool = True
    compile_twice: bool = True
    on_step: Callable[[str], None] = lambda _: None

    def job(self, candidate: Candidate) -> Job:
        """What the candidate's worker gets."""
        folder = "".join(c if c.isalnum() else "_" for c in candidate.name)
        cache = str(self.out.resolve() / "kernels" / folder)
        return Job(
            self.model, candidate, self.sizes, cache, self.mode, self.threads, self.kernels
        )  # fmt: skip


@dataclass
class Measured:
    """Raw figures of one candidate. cold_s, warm_s: of a first generation, compiling included."""

    candidate: Candidate
    cold_s: float | None = None
    warm_s: float | None = None
    generations: list[Generation] = field(default_factory=list)
    finished: Finished | None = None
    error: str = ""

    def seconds_of_a_generation(self) -> float:
        """Median of the timed ones."""
        return median(sum(g.wall_ms) for g in self.generations) / 1e3

    def compile_s(self, first_s: float | None) -> float | None:
        """What of a first generation was compiling; None where there is none."""
        if first_s is None or self.candidate.kind == EAGER or not self.generations:
            return None
        return max(0.0, first_s - self.seconds_of_a_generation())


class WorkerFailed(Exception):
    """The message says why a worker could not go on."""


class Worker:
    """The parent's end of one worker process."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, job), daemon=True)
        self._process.start()
        theirs.close()

    def ready(self) -> Ready:
        """Waits for the first generation. Raises WorkerFailed, as all of these."""
        return self._receive()

    def generation(self, options: dict[str, Any] | None = None) -> Generation:
        """One timed generation."""
        return self._ask(GENERATION, options)

    def finish(self) -> Finished:
        """Counts, and the end of the process."""
        found = self._ask(FINISH)
        self.close()
        return found

    def close(self) -> None:
        """Let the process end; make it, where it does not within a few seconds."""
        if self._connection.closed:
            return
        with suppress(BrokenPipeError, OSError):
            self._connection.send(None)
        self._process.join(timeout=5)
        self._process.terminate()
        self._process.join()
        self._connection.close()

    def _ask(self, verb: str, options: dict[str, Any] | None = None) -> Any:
        try:
            self._connection.send((verb, options))
        except (BrokenPipeError, OSError) as error:
            raise WorkerFailed(self._how_it_ended()) from error
        return self._receive()

    def _receive(self) -> Any:
        try:
            found = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise WorkerFailed(self._how_it_ended()) from error
        if isinstance(found, Failed):
            raise WorkerFailed(found.reason)
        return found

    def _how_it_ended(self) -> str:
        self._process.join(timeout=5)
        return f"its process ended with exit code {self._process.exitcode}"


def measure(plan: Plan) -> list[Measured]:
    """All candidates, in their order; one that fails has its reason instead of figures."""
    shutil.rmtree(plan.out / "kernels", ignore_errors=True)
    measured = [Measured(candidate) for candidate in plan.candidates]
    workers: dict[str, Worker] = {}
    try:
        for one in measured:
            _guarded(one, lambda one=one: _start(plan, one, workers))
        for _ in range(plan.rounds):
            for one in (m for m in measured if not m.error):
                plan.on_step(f"{one.candidate.name}: generation")
                worker = workers[one.candidate.name]
                _guarded(one, lambda o=one, w=worker: o.generations.append(w.generation()))
        for one in (m for m in measured if not m.error):
            worker = workers[one.candidate.name]
            _guarded(one, lambda o=one, w=worker: setattr(o, "finished", w.finish()))
    finally:
        for worker in workers.values():
            worker.close()
    return measured


def steps_of(plan: Plan) -> int:
    """How often `on_step` will be called, at most."""
    starts = sum(1 + (plan.compile_twice and c.kind not in (EAGER, PEER)) for c in plan.candidates)
    return starts + plan.rounds * len(plan.candidates)


def _start(plan: Plan, one: Measured, workers: dict[str, Worker]) -> None:
    job = plan.job(one.candidate)
    if plan.compile_twice and one.candidate.kind not in (EAGER, PEER):
        plan.on_step(f"{one.candidate.name}: cold start")
        cold = Worker(job)
        try:
            one.cold_s = cold.ready().first_s
        finally:
            cold.close()
    plan.on_step(f"{one.candidate.name}: start")
    workers[one.candidate.name] = Worker(job)
    first_s = workers[one.candidate.name].ready().first_s
    if plan.compile_twice and one.candidate.kind not in (EAGER, PEER):
        one.warm_s = first_s
    else:
        one.cold_s = first_s


def _guarded(one: Measured, action: Callable[[], None]) -> None:
    try:
        action()
    except WorkerFailed as error:
        one.error = str(error)
