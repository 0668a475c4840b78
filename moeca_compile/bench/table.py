"""The run as text: a table per model and sampler, then the verdicts, losing rows included.

print(table(summaries, verdicts, header))
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tabulate import tabulate

from .summary import Summary
from .verdict import METRICS, Point, Verdict

HEADERS = (
    "candidate", "FLOPs /", "PSNR dB", "+-", "mean PSNR", "SSIM", "rel. error", "accuracy",
    "of full", "seconds", "wall /",
)  # fmt: skip
FORMATS = ("", ".2f", ".2f", ".2f", ".2f", ".4f", ".4f", ".3f", ".3f", ".1f", ".2f")
VERDICT_HEADERS = ("model", "sampler", "at", "default policy", "best rival", "dB", "better")


def table(summaries: Sequence[Summary], verdicts: Sequence[Verdict], default: str) -> str:
    """Everything measured and who wins; failed candidates with their reason."""
    parts: list[str] = []
    for subject, sampler in dict.fromkeys((s.subject, s.sampler) for s in summaries):
        own = [s for s in summaries if (s.subject, s.sampler) == (subject, sampler)]
        good = [_line(s) for s in own if s.speedup == s.speedup]
        shown = tabulate(good, HEADERS, floatfmt=FORMATS, missingval="-")
        parts.append(f"{subject}, {sampler}\n\n{shown}")
        failed = [f"failed: {s.name}: {s.error}" for s in own if s.error]
        if failed:
            parts.append("\n".join(failed))
    for metric, meaning in METRICS.items():
        rows = [_verdict(v) for v in verdicts if v.metric == metric]
        shown = tabulate(rows, VERDICT_HEADERS, missingval="-", disable_numparse=True)
        parts.append(
            f"default policy {default!r} against its best rival, PSNR {meaning}\n\n{shown}"
        )
    return "\n\n".join(parts)


def _line(s: Summary) -> list[object]:
    return [
        s.name, s.speedup, s.psnr_db if math.isfinite(s.psnr_db) else "same", s.psnr_spread_db,
        s.psnr_mean_db, s.ssim, s.relative_error, s.accuracy, s.accuracy_full, s.seconds,
        s.wall_speedup,
    ]  # fmt: skip


def _verdict(v: Verdict) -> list[object]:
    difference = None if v.difference_db is None else f"{v.difference_db:+.2f}"
    ours, rival = _point(v.ours), _point(v.rival)
    return [v.subject, v.sampler, f"{v.target:g}x", ours, rival, difference, v.winner]


def _point(point: Point | None) -> str | None:
    if point is None:
        return None
    name = point.name if point.measured else f"{point.policy}, interpolated"
    return f"{name}: {point.psnr_db:.2f} at {point.speedup:.2f}x"
