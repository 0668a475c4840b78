"""The report's heat maps as PNG, for a paper or an issue.

run.computed.png   layers down, steps across; grey where a step has no such value
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

TITLES = {
    "computed": "share of branches computed",
    "unmatched": "share of branches whose expert was not cached",
    "drift": "relative change of rewritten rows",
}


def draw_maps(entries: Sequence[dict[str, Any]], stem: Path) -> list[Path]:
    """One PNG per map and entry that has steps; returns the files."""
    drawn = []
    for number, entry in enumerate(entries):
        suffix = "" if number == 0 else f".{number}"
        for name, rows in entry["maps"].items():
            if rows and entry["layers"]:
                path = stem.with_name(f"{stem.name}{suffix}.{name}.png")
                _draw(name, rows, entry["layers"], path)
                drawn.append(path)
    return drawn


def _draw(name: str, rows: list[list[float | None]], layers: list[str], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values = [[float("nan") if v is None else v for v in row] for row in zip(*rows)]
    figure = Figure(figsize=(min(14.0, 3 + 0.15 * len(rows)), 1.4 + 0.22 * len(layers)), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("#e6e6e6")
    top = 1.0 if name == "computed" else None
    image = axes.imshow(values, aspect="auto", cmap="magma_r", vmin=0, vmax=top)
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    axes.set_xlabel("step")
    axes.set_title(TITLES[name], fontsize=9)
    figure.colorbar(image, ax=axes, pad=0.02)
    figure.tight_layout()
    figure.savefig(path)
