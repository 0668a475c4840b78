"""Where two runs of the same generation part: the first layer and step, and the rows that did it.

first above 0.1: step 3 (t 0.94, reuse), blocks.2.moe experts, 31 % off
  sample 0 token 17: 83 % off   expert 3 (52 % of the weight): read, 2 steps old, score 0.41 ...
worst: step 7 ...
what stands out: no threshold is below 1, scores never exceed 1: nothing cached is ever computed
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from ..options import Options
from ..runtime.history import StepRecord
from .guard_calls import GuardCall
from .row_details import Row


@dataclass(frozen=True)
class Deviation:
    """One layer's value in one step. size: |cached - full| / |full|; rows: the worst ones."""

    layer: str
    part: str
    size: float
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class GuardTotals:
    """One reuse step, all layers: what its guards saw. computed: of the matched branches."""

    matched: int
    computed: int
    dropped: int
    lowest_threshold: float
    highest_score: float


@dataclass(frozen=True)
class StepDeviation:
    """One call of the model, in the order of the graph. guards: None unless it was a reuse step."""

    number: int
    kind: str
    reason: str
    timestep: float | None
    deviations: tuple[Deviation, ...]
    guards: GuardTotals | None

    @classmethod
    def of(
        cls,
        number: int,
        record: StepRecord,
        deviations: tuple[Deviation, ...],
        guards: Sequence[GuardCall],
    ) -> StepDeviation:
        """From what the entry recorded and what the guards decided."""
        timestep = record.place.timestep if record.place is not None else None
        kind, reason = record.decision.kind, record.decision.reason
        return cls(number, kind, reason, timestep, deviations, _totals(guards))

    @property
    def worst(self) -> Deviation:
        """The layer that is off most."""
        return max(self.deviations, key=lambda d: d.size)  # the model's output is always there

    def __str__(self) -> str:
        time = "" if self.timestep is None else f"t {self.timestep:.4g}, "
        return f"step {self.number} ({time}{self.kind} because {self.reason})"


@dataclass(frozen=True)
class Comparison:
    """A whole generation. bound: as asked for; notes: graphs that were not compared and why."""

    bound: float
    options: Options
    steps: tuple[StepDeviation, ...]
    notes: tuple[str, ...] = ()

    @property
    def first(self) -> tuple[StepDeviation, Deviation] | None:
        """The first layer of the first step that is off by more than the bound; None if none is."""
        for step in self.steps:
            for deviation in step.deviations:
                if deviation.size > self.bound:
                    return step, deviation
        return None

    @property
    def worst(self) -> tuple[StepDeviation, Deviation] | None:
        """The largest deviation of all; None if nothing was compared."""
        if not self.steps:
            return None
        step = max(self.steps, key=lambda s: s.worst.size)
        return step, step.worst

    @property
    def findings(self) -> tuple[str, ...]:
        """What stands out in the guards' decisions, in words."""
        return _findings(self)

    def to_dict(self) -> dict[str, Any]:
        """All of it by name, JSON-serialisable."""
        return {
            "bound": self.bound,
            "options": self.options.to_dict(),
            "first": _place(self.first),
            "worst": _place(self.worst),
            "findings": list(self.findings),
            "steps": [asdict(step) for step in self.steps],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [*_head(self), *(f"what stands out: {text}" for text in self.findings)]
        return "\n".join([*lines, *self.notes, "", _table(self.steps)]).rstrip()


def _totals(guards: Sequence[GuardCall]) -> GuardTotals | None:
    if not guards:
        return None
    known = [g.score[g.matched] for g in guards]
    return GuardTotals(
        matched=sum(int(g.matched.sum()) for g in guards),
        computed=sum(int((g.computed & g.matched).sum()) for g in guards),
        dropped=sum(int(g.dropped.sum()) for g in guards),
        lowest_threshold=min(float(g.limit.min()) for g in guards),
        highest_score=max((float(k.max()) for k in known if len(k)), default=0.0),
    )


def _findings(comparison: Comparison) -> tuple[str, ...]:
    totals = [step.guards for step in comparison.steps if step.guards is not None]
    if not comparison.steps:
        return ("no call was compared",)
    if not totals:
        kinds = Counter(step.kind for step in comparison.steps)
        ran = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        return (f"no step reused rows; steps: {ran}",)
    found, options = [], comparison.options
    lowest = min(t.lowest_threshold for t in totals)
    matched, computed = sum(t.matched for t in totals), sum(t.computed for t in totals)
    share = f"{computed} of {matched} cached branches were computed anew on reuse steps"
    if options.budget is None and lowest >= 1:
        found.append(
            f"{share}: the lowest threshold is {lowest:.2f}, scores end at 1; option tau is "
            f"{options.tau:g}, lower it"
        )
    elif options.budget is None and computed == matched:
        found.append(f"{share}: every score is above its threshold; option tau is {options.tau:g}")
    else:
        found.append(share)
    dropped = sum(t.dropped for t in totals)
    if dropped:
        found.append(f"{dropped} branches beyond the budget contributed nothing; raise budget")
    return tuple(found)


def _head(comparison: Comparison) -> list[str]:
    if not comparison.steps:
        return ["nothing was compared"]
    lines = []
    if comparison.first is None:
        lines.append(f"no layer is off by more than {comparison.bound:g}")
    else:
        lines += [f"first above {comparison.bound:g}: {_words(comparison.first)}"]
        lines += _row_lines(comparison.first[1].rows)
    if comparison.worst is not None and comparison.worst != comparison.first:
        lines.append(f"worst: {_words(comparison.worst)}")
        lines += _row_lines(comparison.worst[1].rows[:1])
    return lines


def _words(found: tuple[StepDeviation, Deviation]) -> str:
    step, deviation = found
    return f"{step}, {deviation.layer} {deviation.part}, {100 * deviation.size:.1f} % off"


def _row_lines(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        head = f"sample {row.sample} token {row.position}: {100 * row.difference:.0f} % off"
        lines.append(f"  {head}")
        lines += [f"    {branch}" for branch in row.branches]
    return lines


def _table(steps: Sequence[StepDeviation]) -> str:
    """A line per step: the layer that is off most."""
    rows = [
        (s.number, "" if s.timestep is None else f"{s.timestep:.4g}", s.kind, s.reason,
         f"{100 * s.worst.size:.2f} %", f"{s.worst.layer} {s.worst.part}")
        for s in steps
    ]  # fmt: skip
    headers = ("step", "t", "kind", "reason", "most off", "where")
    return tabulate(rows, headers=headers, disable_numparse=True) if rows else ""


def _place(found: tuple[StepDeviation, Deviation] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    step, deviation = found
    return {"step": step.number, "kind": step.kind, "timestep": step.timestep, **asdict(deviation)}
