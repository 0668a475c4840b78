"""From rows (one per seed) to one line per candidate.

rows of seeds 0 and 1  ->  Summary(name="fora interval=3", speedup=2.9, psnr_db=37.2, ...)

PSNR is that of the mean squared error over all seeds' images; the times are of generations during
which nothing was compiled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from .candidates import FULL
from .metrics import to_psnr
from .store import Row


@dataclass(frozen=True)
class Summary:
    """One candidate over all seeds. psnr_db: inf where nothing differs; psnr_spread_db: largest
    minus smallest of the seeds. accuracy_full: of the uncached runs. error: why there is no figure.
    """

    subject: str
    sampler: str
    name: str
    policy: str
    seeds: tuple[int, ...]
    speedup: float
    psnr_db: float
    psnr_spread_db: float
    psnr_mean_db: float
    ssim: float | None
    relative_error: float
    accuracy: float | None
    accuracy_full: float | None
    seconds: float | None
    wall_speedup: float | None
    key: str
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Every field, JSON-serialisable: None where a figure is infinite or missing."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """Sorted by subject and sampler in the order of the rows, then by speed-up; errors last."""
    found: list[Summary] = []
    for pair in dict.fromkeys((row["subject"], row["sampler"]) for row in rows):
        own = [row for row in rows if (row["subject"], row["sampler"]) == pair]
        full = [row for row in own if row["policy"] == "reference"]
        rest = [row for row in own if row["policy"] != "reference"]
        base = _seconds(row for row in rest if row["policy"] == FULL)
        groups = [
            [row for row in rest if row["candidate"] == name]
            for name in dict.fromkeys(row["candidate"] for row in rest)
        ]
        made = [_summary(group, _mean(full, "accuracy"), base) for group in groups]
        found += sorted(made, key=lambda s: (s.error is not None, s.speedup))
    return found


def _summary(rows: list[Row], accuracy_full: float | None, base: float | None) -> Summary:
    failed = next((row for row in rows if row.get("error")), None)
    good = [row for row in rows if not row.get("error")]
    seconds = _seconds(good)
    each = [to_psnr(row["mse"], row["peak"]) for row in good]
    finite = [value for value in each if math.isfinite(value)]
    first = rows[0]
    return Summary(
        subject=first["subject"],
        sampler=first["sampler"],
        name=first["candidate"],
        policy=first["policy"],
        seeds=tuple(row["seed"] for row in good),
        speedup=_mean(good, "speedup") or math.nan,
        psnr_db=to_psnr(fmean(r["mse"] for r in good), first["peak"]) if good else math.nan,
        psnr_spread_db=max(finite) - min(finite) if finite else 0.0,
        psnr_mean_db=_number(_mean(good, "psnr_mean_db")),
        ssim=_mean(good, "ssim"),
        relative_error=_number(_mean(good, "relative_error")),
        accuracy=_mean(good, "accuracy"),
        accuracy_full=accuracy_full,
        seconds=seconds,
        wall_speedup=base / seconds if base and seconds else None,
        key=first["key"],
        error=None if failed is None else failed["error"],
    )


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return fmean(values) if values else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _seconds(rows: Iterable[Row]) -> float | None:
    """The fastest warm generation: what disturbs a machine only ever adds. None for no kernels."""
    warm = [r["seconds"] for r in rows if r.get("warm") and r["engine"] == "inductor"]
    return min(warm) if warm else None
