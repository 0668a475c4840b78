"""Whether the pictures got worse as pictures: the Frechet distance over thousands of them.

rows = frechet_rows(plan, count=2000)   # batches of plan.samples, a seed each

A paired distance punishes another picture that is as good; this one does not, but it needs many
samples: under 2000 it cannot rank. Distances are to real images (where the subject has their
moments) and to the full run's images. Only distances of equal counts can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from ..errors import MoecaError
from .candidates import Candidate
from .engine import Engine, Generation, Run
from .metrics import Moments, frechet, moments
from .quality import Plan
from .store import Row, RowStore, row_key, sources_digest
from .subject import Subject

RANKS_FROM = 2000
FIRST_SEED = 1000  # away from the seeds of the paired runs


def frechet_rows(plan: Plan, count: int) -> list[Row]:
    """One row per candidate of the plan, the full run first; frechet.jsonl in the plan's folder.

    Raises MoecaError for a subject without .features.
    """
    for subject in plan.subjects:
        if not hasattr(subject.first, "features"):
            raise MoecaError(f"{subject.name} has no .features(images); see bench/subject.py")
    store = RowStore(plan.out / "frechet.jsonl", plan.resume)
    seeds = [FIRST_SEED + n for n in range(math.ceil(count / plan.samples))]
    rows: list[Row] = []
    total = sum(1 + len(_candidates(plan, *pair)) for pair in plan.pairs()) * len(seeds)
    with tqdm(total=total, unit="batch", ncols=100, disable=None) as bar:
        for subject in plan.subjects:
            with Engine(subject, Run(plan.engine, plan.samples, bar.refresh)) as engine:
                for sampler in (name for other, name in plan.pairs() if other is subject):
                    found = _Found(plan, engine, sampler, seeds, store, bar)
                    rows += found.rows(_candidates(plan, subject, sampler))
    return rows


def frechet_table(rows: Sequence[Row]) -> str:
    """Sorted as measured; says so when there are too few images to rank by."""
    names = ("subject", "sampler", "candidate", "speedup", "to_real", "to_full", "accuracy")
    shown = tabulate(
        [[row.get(name) for name in names] for row in rows],
        ("model", "sampler", "candidate", "FLOPs /", "to real", "to full run", "accuracy"),
        floatfmt=("", "", "", ".2f", ".3f", ".3f", ".4f"),
        missingval="-",
    )
    count = min((row["images"] for row in rows), default=0)
    few = f"; fewer than {RANKS_FROM} cannot rank" if count < RANKS_FROM else ""
    return f"Frechet distance of {count} images{few}\n\n{shown}"


def _candidates(plan: Plan, subject: Subject, sampler: str) -> list[Candidate]:
    return [c for c in plan.all_candidates(subject, sampler) if c != Candidate()]


@dataclass(frozen=True)
class _Found:
    """One subject with one sampler."""

    plan: Plan
    engine: Engine
    sampler: str
    seeds: list[int]
    store: RowStore
    bar: Any

    def rows(self, candidates: Sequence[Candidate]) -> list[Row]:
        """The full run, then the candidates, each from disk or over all batches."""
        full = self._row(None)
        rows = [self._row(candidate) for candidate in candidates]
        return [row | _to_full(row, full) for row in (full, *rows)]

    def _row(self, candidate: Candidate | None) -> Row:
        subject, name = self.engine.subject, "full run" if candidate is None else candidate.name
        key = row_key(
            subject=subject.name,
            sampler=self.sampler,
            steps=subject.steps_of(self.sampler),
            weights=subject.weights,
            settings=subject.settings,
            samples=self.plan.samples,
            seeds=self.seeds,
            engine=self.plan.engine,
            candidate=None if candidate is None else candidate.identity,
        )
        self.bar.set_description(f"{subject.name} {self.sampler}: {name}"[:48])
        found = self.store.find(key)
        if found is not None:
            self.bar.update(len(self.seeds))
            return found
        head = {"key": key, "subject": subject.name, "sampler": self.sampler, "candidate": name}
        figures = _figures(subject, self._batches(candidate), self.bar)
        return self.store.append(head | figures | {"sources": sources_digest()})

    def _batches(self, candidate: Candidate | None) -> Iterator[Generation]:
        if candidate is None:
            return (self.engine.reference(self.sampler, seed) for seed in self.seeds)
        return self.engine.generations(self.sampler, candidate, self.seeds)


def _figures(subject: Subject, batches: Iterable[Generation], bar: Any) -> Row:
    features: list[Tensor] = []
    accuracy: list[float | None] = []
    speedups: list[float] = []
    calls = 0
    for made in batches:
        features.append(subject.first.features(made.images))  # type: ignore[attr-defined]
        accuracy.append(subject.accuracy(made.images))
        calls = made.calls
        speedups.append(made.speedup(made.calls))
        bar.update(1)
    found = moments(torch.cat(features))
    known = [value for value in accuracy if value is not None]
    real = getattr(subject.first, "real", None)
    return {
        "images": sum(map(len, features)),
        "calls": calls,
        "cached_speedup": sum(speedups) / len(speedups),
        "accuracy": sum(known) / len(known) if known else None,
        "to_real": None if real is None else frechet(found, Moments(*real)),
        "moments": [found.mean.tolist(), found.covariance.tolist()],
    }


def _to_full(row: Row, full: Row) -> Row:
    """Speed-up over the full run's calls, and the distance to its images."""
    ours, theirs = (
        Moments(*(torch.tensor(part, dtype=torch.float64) for part in each["moments"]))
        for each in (row, full)
    )
    speedup = row["cached_speedup"] * full["calls"] / row["calls"]
    return {"to_full": frechet(ours, theirs), "speedup": speedup}
