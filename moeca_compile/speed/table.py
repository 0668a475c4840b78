"""The run as text: times, then arithmetic and memory; a row for everything, slower ones too.

print(table(rows, head))
"""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from .figures import Figures
from .rows import RowCosts

TIMES = (
    "candidate", "ms / step", "full step", "cached step", "ms / generation", "CPU ms / step",
    "/ shipped", "/ one graph", "/ FLOPs", "kept", "kept, CPU",
)  # fmt: skip
REST = (
    "candidate", "GFLOPs", "branches computed", "compile s", "again, warm", "cache MiB", "peak MiB",
    "with compiling",
)  # fmt: skip
TIME_FORMATS = ("", ".1f", ".1f", ".1f", ".0f", ".1f", ".2f", ".2f", ".2f", ".2f", ".2f")
REST_FORMATS = ("", ".1f", ".3f", ".1f", ".1f", ".1f", ".0f", ".0f")


def table(rows: Sequence[Figures], head: str) -> str:
    """Both tables, failures and notes."""
    good = [row for row in rows if not row.error]
    times = tabulate([_times(r) for r in good], TIMES, floatfmt=TIME_FORMATS, missingval="-")
    rest = tabulate([_rest(r) for r in good], REST, floatfmt=REST_FORMATS, missingval="-")
    failed = [f"failed: {row.name}: {row.error}" for row in rows if row.error]
    notes = [f"{row.name}: {note}" for row in rows for note in row.notes]
    return "\n\n".join(part for part in (head, times, rest, "\n".join([*failed, *notes])) if part)


def _times(r: Figures) -> list[object]:
    return [
        r.name, r.ms_step, r.refresh_ms, r.cached_ms, r.ms_generation, r.cpu_ms_step,
        r.over_shipped, r.over_one_graph, r.over_flops, r.kept, r.cpu_kept,
    ]  # fmt: skip


def _rest(r: Figures) -> list[object]:
    return [
        r.name, None if r.flops is None else r.flops / 1e9, r.computed, r.compile_cold_s,
        r.compile_warm_s, _mib(r.cache_bytes), _mib(r.peak_bytes), _mib(r.peak_bytes_all),
    ]  # fmt: skip


def _mib(count: int | None) -> float | None:
    return None if count is None else count / 2**20


def rows_table(costs: RowCosts, head: str) -> str:
    """Cost of a reuse step at every share, and the line through it."""
    lines = [
        (p.asked, p.computed, p.wall_ms, p.cpu_ms, p.wall_ms / costs.full_wall_ms,
         p.cpu_ms / costs.full_cpu_ms, costs.full_wall_ms / p.wall_ms)
        for p in costs.points
    ]  # fmt: skip
    headers = ("budget", "computed", "ms", "CPU ms", "of a refresh", "CPU", "times cheaper")
    shown = tabulate(lines, headers, floatfmt=("g", ".3f", ".1f", ".1f", ".3f", ".3f", ".2f"))
    fits = [
        f"{name}: {100 * fit.intercept:.1f} % of a refresh step + {fit.slope:.2f} x share computed "
        f"(largest distance from the line {100 * fit.worst:.1f} %)"
        for name, fit in (("wall", costs.wall), ("CPU", costs.cpu))
    ]
    full = f"refresh step {costs.full_wall_ms:.1f} ms, CPU {costs.full_cpu_ms:.1f} ms"
    return "\n\n".join((head, shown, "\n".join((full, *fits))))
