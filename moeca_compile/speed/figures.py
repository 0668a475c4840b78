"""From raw times and counts to the figures shown and stored.

Measured  ->  Figures(ms_step, refresh_ms, cached_ms, speed-ups over the baselines, their ratio)

Speed-up by time is over Inductor on one graph without caching, the fastest honest baseline, and
over Inductor as the model ships. `kept` is the first of them over the speed-up by FLOPs: what of
the saved arithmetic arrived as time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from .candidates import EAGER, INDUCTOR, ONE_GRAPH
from .measure import Measured

FULL_KINDS = ("full", "plain", "refresh", "not seen")


@dataclass(frozen=True)
class Figures:
    """One row. Times are medians over steps or generations; None where there is none.

    cpu_ms_step: processor time of all threads. over_*: speed-ups by wall time, cpu_over_one_graph
    by processor time. error: why there is no figure. notes: what a reader has to know.
    """

    name: str
    kind: str
    ms_step: float | None = None
    cpu_ms_step: float | None = None
    refresh_ms: float | None = None
    cached_ms: float | None = None
    ms_generation: float | None = None
    over_shipped: float | None = None
    over_one_graph: float | None = None
    cpu_over_one_graph: float | None = None
    over_flops: float | None = None
    kept: float | None = None
    cpu_kept: float | None = None
    computed: float | None = None
    compile_cold_s: float | None = None
    compile_warm_s: float | None = None
    flops: float | None = None
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    peak_bytes_all: int | None = None
    error: str = ""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Every field, JSON-serialisable."""
        return asdict(self)


def figures(measured: Sequence[Measured]) -> list[Figures]:
    """A row for every candidate, in order."""
    rows = [_own(one) for one in measured]
    shipped = _first(rows, INDUCTOR)
    honest = _first(rows, ONE_GRAPH)
    full = next((r.flops for r in rows if r.kind == EAGER and r.flops), None)
    return [_compared(row, shipped, honest, full) for row in rows]


def _first(rows: Sequence[Figures], kind: str) -> Figures | None:
    return next((r for r in rows if r.kind == kind and r.ms_step), None)


def _own(one: Measured) -> Figures:
    row = Figures(one.candidate.name, one.candidate.kind, error=one.error)
    if one.error or one.finished is None:
        return row
    steps = len(one.generations[0].kinds)
    wall = median(sum(g.wall_ms) for g in one.generations)
    done = one.finished
    return replace(
        row,
        ms_step=wall / steps,
        cpu_ms_step=median(sum(g.cpu_ms) for g in one.generations) / steps,
        refresh_ms=_of_kinds(one, full=True),
        cached_ms=_of_kinds(one, full=False),
        ms_generation=wall,
        computed=_computed(one),
        compile_cold_s=one.compile_s(one.cold_s),
        compile_warm_s=one.compile_s(one.warm_s),
        flops=done.flops,
        cache_bytes=done.cache_bytes,
        peak_bytes=done.peak_bytes,
        peak_bytes_all=done.peak_bytes_all,
        notes=tuple(done.notes),
    )


def _of_kinds(one: Measured, full: bool) -> float | None:
    """Median ms of the steps that compute everything, or of the others."""
    found = [
        ms
        for g in one.generations
        for kind, ms in zip(g.kinds, g.wall_ms)
        if (kind in FULL_KINDS) == full
    ]
    return median(found) if found else None


def _computed(one: Measured) -> float | None:
    shares = [g.computed for g in one.generations if "reuse" in g.kinds]
    return median(shares) if shares else None


def _compared(
    row: Figures, shipped: Figures | None, honest: Figures | None, full: float | None
) -> Figures:
    if row.ms_step is None:
        return row
    # Inductor computes what eager does and does not count; what a peer computes nobody knows.
    flops = full if row.kind == INDUCTOR else row.flops
    by_flops = full / flops if full and flops else None
    wall = _ratio(honest, row, "ms_step")
    cpu = _ratio(honest, row, "cpu_ms_step")
    return replace(
        row,
        flops=flops,
        over_shipped=_ratio(shipped, row, "ms_step"),
        over_one_graph=wall,
        cpu_over_one_graph=cpu,
        over_flops=by_flops,
        kept=wall / by_flops if wall and by_flops else None,
        cpu_kept=cpu / by_flops if cpu and by_flops else None,
    )


def _ratio(base: Figures | None, row: Figures, name: str) -> float | None:
    over, own = getattr(base, name, None), getattr(row, name)
    return over / own if over and own else None
