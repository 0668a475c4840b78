"""The run itself: subjects x samplers x candidates x seeds, one row per generation.

plan = Plan([subject], ["euler"], choice.candidates, out=Path("out/quality"))
rows = measure(plan)     # rows.jsonl grows; images/ holds the full runs and a few pictures each

Everything is compared with the uncached eager run of the same seed. Fewer steps are measured
whatever else was asked for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import MoecaError
from .candidates import STEP_RATIOS, Candidate, fewer_steps
from .engine import INDUCTOR, Engine, Generation, Run
from .metrics import mean_psnr, mean_squared_error, relative_error, ssim, to_psnr
from .store import Row, RowStore, row_key, sources_digest, versions
from .subject import Subject

log = logging.getLogger(__name__)
SHOWN = 10  # pictures kept of the first seed of every candidate


@dataclass(frozen=True)
class Plan:
    """What to measure. samplers: names, None for every one of each subject.

    step_ratios: how many times fewer steps the baseline takes.
    """

    subjects: Sequence[Subject]
    candidates: Sequence[Candidate]
    out: Path
    samplers: Sequence[str] | None = None
    seeds: Sequence[int] = (0, 1)
    samples: int = 64
    engine: str = INDUCTOR
    resume: bool = False
    step_ratios: Sequence[float] = STEP_RATIOS

    def pairs(self) -> list[tuple[Subject, str]]:
        """Every subject with every sampler asked for. Raises MoecaError for an unknown one."""
        found = [
            (subject, name)
            for subject in self.subjects
            for name in (self.samplers or subject.samplers)
            if name in subject.samplers
        ]
        for name in self.samplers or ():
            if not any(name == sampler for _, sampler in found):
                known = sorted({n for s in self.subjects for n in s.samplers})
                raise MoecaError(f"no model has a sampler {name!r}; there are {', '.join(known)}")
        return found

    def all_candidates(self, subject: Subject, sampler: str) -> list[Candidate]:
        """The run without caching where its time counts, fewer steps, and what was asked for."""
        own = [Candidate()] if self.engine == INDUCTOR else []
        own += [*fewer_steps(subject.steps_of(sampler), self.step_ratios), *self.candidates]
        return list({candidate.identity: candidate for candidate in own}.values())


def measure(plan: Plan) -> list[Row]:
    """Every row of the plan, those found on disk included, in the order of the plan."""
    store = RowStore(plan.out / "rows.jsonl", plan.resume)
    if store.stale:
        log.warning("%d rows on disk were measured with other sources", store.stale)
    pairs = plan.pairs()
    rows: list[Row] = []
    total = sum(1 + len(plan.all_candidates(*pair)) for pair in pairs) * len(plan.seeds)
    with tqdm(total=total, unit="run", ncols=100, disable=None) as bar:
        for subject in plan.subjects:
            run = Run(plan.engine, plan.samples, bar.refresh)
            with Engine(subject, run) as engine:
                for sampler in (name for other, name in pairs if other is subject):
                    rows += _Pair(plan, subject, sampler, store, bar, engine).measure()
    return rows


@dataclass
class _Pair:
    """One subject with one sampler. `fulls`: reference images and number of calls by seed."""

    plan: Plan
    subject: Subject
    sampler: str
    store: RowStore
    bar: Any
    engine: Engine
    fulls: dict[int, tuple[Tensor, int]] = field(default_factory=dict)

    def measure(self) -> list[Row]:
        rows = [self._full(seed) for seed in self.plan.seeds]
        for candidate in self.plan.all_candidates(self.subject, self.sampler):
            rows += self._candidate(candidate)
        return rows

    def _full(self, seed: int) -> Row:
        """The reference, from disk if its row and its images are there."""
        key = self._key("reference", seed, "eager")
        self._show("reference")
        found, images = self.store.find(key), self._images(key)
        if found is None or not images.exists():
            made = self.engine.reference(self.sampler, seed)
            images.parent.mkdir(parents=True, exist_ok=True)
            torch.save(made.images, images)
            found = self._head(key, "reference", "reference", None, seed)
            found |= {"calls": made.calls, "speedup": 1.0, "seconds": made.seconds}
            found["accuracy"] = self.subject.accuracy(made.images)
            self.store.append(found)
        self.fulls[seed] = (torch.load(images), found["calls"])
        self.bar.update(1)
        return found

    def _candidate(self, candidate: Candidate) -> list[Row]:
        """Rows of all seeds; a candidate that fails leaves one row that says why."""
        self._show(candidate.name)
        keys = {
            seed: self._key(candidate.identity, seed, self.plan.engine) for seed in self.plan.seeds
        }
        rows = {seed: self.store.find(key) for seed, key in keys.items()}
        missing = [seed for seed, row in rows.items() if row is None]
        self.bar.update(len(keys) - len(missing))
        if missing:
            rows |= self._run(candidate, {seed: keys[seed] for seed in missing})
        return [row for row in rows.values() if row is not None]

    def _run(self, candidate: Candidate, keys: dict[int, str]) -> dict[int, Row]:
        rows: dict[int, Row] = {}
        try:
            for made in self.engine.generations(self.sampler, candidate, list(keys)):
                row = self._row(keys[made.seed], candidate, made)
                rows[made.seed] = self.store.append(row)
                self.bar.update(1)
        except Exception as error:  # one policy that fails must not end a run of hours
            log.warning("%s failed: %s", candidate.name, error, exc_info=log.isEnabledFor(10))
            seed = next(seed for seed in keys if seed not in rows)
            row = self._describe(keys[seed], candidate, seed)
            rows[seed] = self.store.append({**row, "error": f"{type(error).__name__}: {error}"})
        return rows

    def _row(self, key: str, candidate: Candidate, made: Generation) -> Row:
        full, full_calls = self.fulls[made.seed]
        peak = self.subject.peak
        mse = mean_squared_error(full, made.images)
        row = self._describe(key, candidate, made.seed) | {
            "calls": made.calls,
            "speedup": made.speedup(full_calls),
            "mse": mse,
            "psnr_db": _finite(to_psnr(mse, peak)),
            "psnr_mean_db": mean_psnr(full, made.images, peak),
            "ssim": ssim(full, made.images, peak),
            "relative_error": relative_error(full, made.images),
            "accuracy": self.subject.accuracy(made.images),
            "seconds": made.seconds,
            "warm": made.warm,
        }
        if made.stats is not None:
            row |= {"flops_full": made.stats.flops_full, "cache_bytes": made.stats.cache_bytes}
            row |= {"flops_computed": made.stats.flops_computed, "cached_calls": made.stats.steps}
            row["refresh_reasons"] = dict(made.stats.reasons)
        if made.seed == self.plan.seeds[0]:
            self._images(key).parent.mkdir(parents=True, exist_ok=True)
            torch.save(made.images[:SHOWN].clone(), self._images(key))
        return row

    def _describe(self, key: str, candidate: Candidate, seed: int) -> Row:
        row = self._head(key, candidate.name, candidate.policy, candidate.options, seed)
        return row | {"steps": candidate.steps or row["steps"]}

    def _head(self, key: str, name: str, policy: str, options: Any, seed: int) -> Row:
        return {
            "key": key,
            "subject": self.subject.name,
            "sampler": self.sampler,
            "candidate": name,
            "policy": policy,
            "options": options,
            "steps": self.subject.steps_of(self.sampler),
            "seed": seed,
            "samples": self.plan.samples,
            "engine": self.plan.engine,
            "peak": self.subject.peak,
            "weights": self.subject.weights,
            "settings": self.subject.settings,
            "sources": sources_digest(),
            "versions": versions(),
        }

    def _key(self, candidate: str, seed: int, engine: str) -> str:
        return row_key(
            subject=self.subject.name,
            sampler=self.sampler,
            steps=self.subject.steps_of(self.sampler),
            weights=self.subject.weights,
            settings=self.subject.settings,
            samples=self.plan.samples,
            seed=seed,
            candidate=candidate,
            engine=engine,
        )

    def _images(self, key: str) -> Path:
        return self.plan.out / "images" / f"{key}.pt"

    def _show(self, name: str) -> None:
        self.bar.set_description(f"{self.subject.name} {self.sampler}: {name}"[:48])


def _finite(value: float) -> float | None:
    """JSON has no infinity: None for images that are the same."""
    return value if math.isfinite(value) else None
