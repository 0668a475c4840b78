"""Who wins, at 2, 3 and 4 times fewer FLOPs: the default policy or the best of its rivals.

judge(summaries, default="auto")
->  Verdict(target=3.0, ours=Point("auto ..", 2.95, 44.1), rival=Point("taylorseer ..", 2.9, 43.2),
            difference_db=0.9, winner="auto")

Candidates never land on the same speed-up, so the rule leans towards the rivals:
  ours     the default policy's best PSNR at OURS_FROM of the target or faster
  rival    the best of any other policy, fewer steps included, at RIVALS_FROM of the target or
           faster, thus up to a tenth slower than the target; or, where it is better, what
           interpolating a rival between its two nearest settings gives at our own speed-up
A difference under TOLERANCE_DB counts as equal. There are two verdicts each, by METRICS: PSNR over
all pixels of all images, which one image that became another picture decides, and the mean of each
image's own, as papers give it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from .candidates import FULL
from .summary import Summary

TARGETS = (2.0, 3.0, 4.0)
OURS_FROM = 0.95
RIVALS_FROM = 0.9
TOLERANCE_DB = 0.2
EQUAL, NOBODY = "equal", "nobody"
METRICS = {"psnr_db": "over all pixels", "psnr_mean_db": "mean over images"}


@dataclass(frozen=True)
class Point:
    """A place in the plane of the Pareto plot. measured: False for an interpolated one."""

    name: str
    policy: str
    speedup: float
    psnr_db: float
    measured: bool = True


@dataclass(frozen=True)
class Verdict:
    """One model, sampler and speed. winner: a policy, "equal", or "nobody" reached the speed.

    metric: a key of METRICS. difference_db: ours minus the rival's; None where one is missing.
    """

    subject: str
    sampler: str
    target: float
    ours: Point | None
    rival: Point | None
    winner: str
    metric: str = "psnr_db"

    @property
    def difference_db(self) -> float | None:
        if self.ours is None or self.rival is None:
            return None
        return self.ours.psnr_db - self.rival.psnr_db

    def to_dict(self) -> dict[str, Any]:
        """Every field and the difference, JSON-serialisable."""
        return {**asdict(self), "difference_db": self.difference_db}


def judge(
    summaries: Sequence[Summary],
    default: str,
    targets: Sequence[float] = TARGETS,
    metric: str = "psnr_db",
) -> list[Verdict]:
    """A verdict per subject, sampler and target; default: the policy that has to defend itself."""
    verdicts = []
    for subject, sampler in dict.fromkeys((s.subject, s.sampler) for s in summaries):
        points = [
            Point(s.name, s.policy, s.speedup, getattr(s, metric))
            for s in summaries
            if (s.subject, s.sampler) == (subject, sampler) and _counts(s)
        ]
        for target in targets:
            ours = best([p for p in points if p.policy == default], OURS_FROM * target)
            others = [p for p in points if p.policy != default]
            rival = best([*others, *_level_with(ours, others)], RIVALS_FROM * target)
            winner = _winner(ours, rival)
            verdicts.append(Verdict(subject, sampler, target, ours, rival, winner, metric))
    return verdicts


def best(points: Sequence[Point], at_least: float) -> Point | None:
    """The highest PSNR at a speed-up of `at_least`, the faster of equals; None if there is none."""
    fast = [p for p in points if p.speedup >= at_least]
    return max(fast, key=lambda p: (p.psnr_db, p.speedup), default=None)


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other point beats in both speed and PSNR, slowest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.speedup, -p.psnr_db)):
        if not kept or point.psnr_db > kept[-1].psnr_db:
            kept.append(point)
    return kept[::-1]


def at_speed(points: Sequence[Point], speedup: float) -> Point | None:
    """One policy's PSNR at `speedup`, on the line between its nearest two frontier points.

    None outside of what was measured: nothing is extrapolated.
    """
    for slow, fast in pairwise(frontier(points)):
        if slow.speedup < speedup < fast.speedup:
            share = (speedup - slow.speedup) / (fast.speedup - slow.speedup)
            psnr_db = slow.psnr_db + share * (fast.psnr_db - slow.psnr_db)
            name = f"between {slow.name} and {fast.name}"
            return Point(name, slow.policy, speedup, psnr_db, measured=False)
    return None


def _level_with(ours: Point | None, others: Sequence[Point]) -> list[Point]:
    if ours is None:
        return []
    policies = dict.fromkeys(p.policy for p in others)
    found = [at_speed([p for p in others if p.policy == n], ours.speedup) for n in policies]
    return [point for point in found if point is not None]


def _counts(summary: Summary) -> bool:
    return summary.error is None and summary.policy != FULL and math.isfinite(summary.psnr_db)


def _winner(ours: Point | None, rival: Point | None) -> str:
    if ours is None or rival is None:
        left = ours or rival
        return NOBODY if left is None else left.policy
    difference = ours.psnr_db - rival.psnr_db
    if abs(difference) < TOLERANCE_DB:
        return EQUAL
    return ours.policy if difference > 0 else rival.policy
