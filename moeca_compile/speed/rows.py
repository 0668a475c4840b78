"""What a reuse step costs against the share of rows it computes, and the line through it.

budget 0 .. 0.5  ->  ms of a reuse step / ms of a refresh  =  intercept + slope * share

One compiled graph serves all budgets: they take turns on the same kernels. The intercept is what a
reuse step costs that computes nothing: embedder, router, norms, head, and the selection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from .candidates import BUDGETED, MOECA, Candidate
from .measure import Plan, Worker
from .worker import Finished, Generation

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
SMALLEST = 1e-9  # a budget is above zero; this one leaves the two rows a sample has to have
CANDIDATE = Candidate("reuse at any budget", MOECA, BUDGETED)


@dataclass(frozen=True)
class Point:
    """One budget. computed: share of the branches that ran. Times: medians of its reuse steps."""

    asked: float
    computed: float
    wall_ms: float
    cpu_ms: float


@dataclass(frozen=True)
class Fit:
    """Least squares over shares computed, in units of a refresh step."""

    intercept: float
    slope: float
    worst: float


@dataclass(frozen=True)
class RowCosts:
    """Times of a refresh step, points in ascending order, and a line for each clock."""

    full_wall_ms: float
    full_cpu_ms: float
    points: tuple[Point, ...]
    wall: Fit
    cpu: Fit
    finished: Finished

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-serialisable."""
        return asdict(self)


def measure_rows(plan: Plan, shares: Sequence[float] = SHARES) -> RowCosts:
    """Raises WorkerFailed with the reason."""
    (candidate,) = plan.candidates
    plan.on_step("compiling")
    worker = Worker(plan.job(candidate))
    try:
        worker.ready()
        found: dict[float, list[Generation]] = {share: [] for share in shares}
        for _ in range(plan.rounds):
            for share in shares:
                plan.on_step(f"budget {share:g}")
                found[share].append(worker.generation({"budget": share or SMALLEST}))
        return summarise(found, worker.finish())
    finally:
        worker.close()


def summarise(found: dict[float, list[Generation]], finished: Finished) -> RowCosts:
    """Raw generations by budget -> medians and lines."""
    everything = [g for generations in found.values() for g in generations]
    wall = _median(everything, "refresh", lambda g: g.wall_ms)
    cpu = _median(everything, "refresh", lambda g: g.cpu_ms)
    points = tuple(
        Point(
            share,
            median(g.computed for g in generations),
            _median(generations, "reuse", lambda g: g.wall_ms),
            _median(generations, "reuse", lambda g: g.cpu_ms),
        )
        for share, generations in sorted(found.items())
    )
    computed = [p.computed for p in points]
    return RowCosts(
        wall,
        cpu,
        points,
        fit(computed, [p.wall_ms / wall for p in points]),
        fit(computed, [p.cpu_ms / cpu for p in points]),
        finished,
    )


def fit(shares: Sequence[float], costs: Sequence[float]) -> Fit:
    """The line with the least squared distance. worst: largest distance of a point from it."""
    count = len(shares)
    x, y = sum(shares) / count, sum(costs) / count
    spread = sum((s - x) ** 2 for s in shares)
    slope = sum((s - x) * (c - y) for s, c in zip(shares, costs)) / spread if spread else 0.0
    start = y - slope * x
    return Fit(start, slope, max(abs(start + slope * s - c) for s, c in zip(shares, costs)))


def _median(
    generations: Sequence[Generation], kind: str, clock: Callable[[Generation], list[float]]
) -> float:
    return median(ms for g in generations for k, ms in zip(g.kinds, clock(g)) if k == kind)
