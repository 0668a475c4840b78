"""Two pictures of a run: PSNR against speed-up, and the images themselves.

draw_pareto(summaries, out / "pareto.png")          one panel per model and sampler
draw_grid(rows_of_images, out / "grid.png", peak)   one line per policy, the full run on top
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import MoecaError
from .candidates import FULL, STEPS
from .quality import Plan
from .store import Row
from .summary import Summary
from .verdict import Point, best, frontier

MARKERS = "osD^vP*X<>hp"
GRID_SPEEDUP = 3.0
COLUMNS = 3


def need_matplotlib() -> None:
    """Raises MoecaError, before anything is measured for hours."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MoecaError('plots need matplotlib: pip install "moeca-compile[bench]"')


def draw_pareto(summaries: Sequence[Summary], path: Path) -> None:
    """PSNR over FLOPs speed-up: a line per policy, the frontier of all of them in grey behind."""
    from matplotlib.figure import Figure

    pairs = list(dict.fromkeys((s.subject, s.sampler) for s in summaries))
    columns = min(len(pairs), COLUMNS)
    lines = math.ceil(len(pairs) / COLUMNS)
    figure = Figure(figsize=(5.2 * columns, 4.2 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    policies = list(dict.fromkeys(s.policy for s in summaries if s.policy != FULL))
    for axis, pair in zip(axes, pairs):
        points = [
            Point(s.name, s.policy, s.speedup, s.psnr_db)
            for s in summaries
            if (s.subject, s.sampler) == pair and s.policy != FULL and math.isfinite(s.psnr_db)
        ]
        _panel(axis, points, policies)
        axis.set_title(", ".join(pair))
    for axis in axes[len(pairs) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=120)


def _panel(axis: Any, points: Sequence[Point], policies: Sequence[str]) -> None:
    edge = frontier(points)
    axis.plot(
        [p.speedup for p in edge], [p.psnr_db for p in edge], color="0.8", linewidth=6, zorder=0
    )
    for index, policy in enumerate(policies):
        own = sorted((p for p in points if p.policy == policy), key=lambda p: p.speedup)
        axis.plot(
            [p.speedup for p in own],
            [p.psnr_db for p in own],
            marker=MARKERS[index % len(MARKERS)],
            color="black" if policy == STEPS else f"C{index % 10}",
            linestyle="--" if policy == STEPS else "-",
            linewidth=1,
            markersize=5,
            label=policy,
        )
    axis.set_xlabel("FLOPs of the full run / FLOPs spent")
    axis.set_ylabel("PSNR to the full run, dB")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def draw_grid(plan: Plan, rows: Sequence[Row], summaries: Sequence[Summary], path: Path) -> None:
    """The first pictures of the first seed: full run, then each policy at about GRID_SPEEDUP.

    Only images of one or three channels are drawn; a subject without any is left out.
    """
    from matplotlib.figure import Figure

    lines = [
        line for subject in plan.subjects for line in _lines(plan, subject.name, rows, summaries)
    ]
    if not lines:
        return
    count = max(len(images) for _, images, _ in lines)
    figure = Figure(figsize=(0.8 * count + 2.6, 0.85 * len(lines)), layout="constrained")
    axes = figure.subplots(len(lines), count, squeeze=False)
    for line, (name, images, peak) in zip(axes, lines):
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
        for axis, image in zip(line, images):
            axis.imshow(*_picture(image, peak), cmap="gray", vmin=0, vmax=1)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small")
    figure.savefig(path, dpi=110)


def _lines(
    plan: Plan, subject: str, rows: Sequence[Row], summaries: Sequence[Summary]
) -> list[tuple[str, Tensor, float]]:
    """(caption, images, peak) of one subject with its first sampler."""
    own = [row for row in rows if row["subject"] == subject]
    first = [row for row in own if row["sampler"] == own[0]["sampler"]]
    full = next(row for row in first if row["policy"] == "reference")
    lines = [(f"{subject}\nfull run", full["key"])]
    shown = [s for s in summaries if (s.subject, s.sampler) == (subject, full["sampler"])]
    for policy in dict.fromkeys(s.policy for s in shown if s.policy != FULL):
        points = [
            Point(s.key, policy, s.speedup, s.psnr_db)
            for s in shown
            if s.policy == policy and s.error is None
        ]
        point = best(points, 0.9 * GRID_SPEEDUP) or best(points, 1.0)
        if point is not None:
            caption = f"{policy}\n{point.speedup:.1f}x {point.psnr_db:.1f} dB"
            lines.append((caption, point.name))
    loaded = [(name, plan.out / "images" / f"{key}.pt") for name, key in lines]
    pictures = [(name, torch.load(file)[:8]) for name, file in loaded if file.exists()]
    return [
        (name, i, full["peak"]) for name, i in pictures if i.dim() == 4 and i.shape[1] in (1, 3)
    ]


def _picture(image: Tensor, peak: float) -> tuple[Any]:
    low = -peak / 2 if image.min() < 0 else 0.0
    shown = ((image - low) / peak).clamp(0, 1)
    return (shown[0].numpy() if len(shown) == 1 else shown.permute(1, 2, 0).numpy(),)
