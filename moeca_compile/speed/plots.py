"""Two pictures: bars of a run, and cost against rows.

draw_bars(rows, out / "bench.png")      ms of full and cached steps; mean step; speed-ups
draw_rows(costs, out / "rows.png")      points and line
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .figures import Figures
from .rows import RowCosts


def draw_bars(rows: Sequence[Figures], title: str, path: Path) -> None:
    """Left: milliseconds of a step, by kind. Right: speed-up by time beside that by FLOPs."""
    from matplotlib.figure import Figure

    good = [row for row in rows if row.ms_step]
    figure = Figure(figsize=(11, 1.4 + 0.6 * len(good)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    at = list(range(len(good)))
    kinds = (
        ("full step", "0.8", "refresh_ms"),
        ("mean step", "C0", "ms_step"),
        ("cached step", "C2", "cached_ms"),
    )
    for offset, (label, colour, name) in zip((-0.27, 0.0, 0.27), kinds):
        values = [getattr(row, name) or 0.0 for row in good]
        bars = left.barh([y + offset for y in at], values, 0.25, color=colour, label=label)
        left.bar_label(bars, [f"{v:.0f}" if v else "" for v in values], fontsize="small", padding=2)
    ratios = (("by FLOPs", "0.8", "over_flops"), ("by time", "C0", "over_one_graph"))
    for offset, (label, colour, name) in zip((-0.2, 0.2), ratios):
        values = [getattr(row, name) or 0.0 for row in good]
        bars = right.barh([y + offset for y in at], values, 0.36, color=colour, label=label)
        right.bar_label(
            bars, [f"{v:.2f}" if v else "" for v in values], fontsize="small", padding=2
        )
    left.set_yticks(at, [row.name for row in good])
    left.invert_yaxis()
    left.set_xlabel("ms")
    right.set_xlabel("speed-up over one graph, nothing cached")
    for axis in (left, right):
        axis.legend(fontsize="small")
        axis.margins(x=0.12)
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=120)


def draw_rows(costs: RowCosts, title: str, path: Path) -> None:
    """Cost of a reuse step over the share computed, with the line; wall and processor time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axis = figure.subplots()
    shares = [p.computed for p in costs.points]
    for name, colour, fit, values in (
        ("wall", "C0", costs.wall, [p.wall_ms / costs.full_wall_ms for p in costs.points]),
        ("CPU", "C1", costs.cpu, [p.cpu_ms / costs.full_cpu_ms for p in costs.points]),
    ):
        axis.plot(shares, values, "o", color=colour, label=name)
        label = f"{100 * fit.intercept:.1f} % + {fit.slope:.2f} x"
        ends = [0.0, shares[-1]]
        axis.plot(ends, [fit.intercept + fit.slope * x for x in ends], color=colour, label=label)
    axis.plot([0, shares[-1]], [0, shares[-1]], "--", color="0.6", label="share computed")
    axis.set_xlabel("share of the branches computed")
    axis.set_ylabel("cost, in refresh steps")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    axis.set_title(title, fontsize="small")
    figure.savefig(path, dpi=120)
