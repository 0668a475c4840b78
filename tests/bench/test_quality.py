"""The whole run on a tiny model, graphs as they are: rows, resuming, failures, the command."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from bench import tiny_subject
from bench.tiny_subject import tiny
from cli.commands import moeca
from moeca_compile import MoecaError
from moeca_compile.bench.candidates import Candidate
from moeca_compile.bench.engine import GRAPH, INDUCTOR, Engine, Run
from moeca_compile.bench.frechet import frechet_rows, frechet_table
from moeca_compile.bench.output import write_results
from moeca_compile.bench.quality import Plan, measure
from moeca_compile.bench.subject import look_at
from moeca_compile.bench.summary import summarise
from moeca_compile.runtime.registry import REGISTRY

SUBJECT = f"{Path(tiny_subject.__file__)}:tiny"
CACHED = Candidate.parse("policy=moeca,interval=2,budget=0.25")


def tiny_engine() -> Engine:
    return Engine(look_at("tiny", tiny), Run(GRAPH, samples=2))


def plan(out: Path, **changes: object) -> Plan:
    base = Plan([look_at("tiny", tiny)], [CACHED], out, samplers=["euler"], samples=2)
    settings = {"engine": GRAPH, "step_ratios": (2.0,), **changes}
    return replace(base, **settings)  # type: ignore[arg-type]


def test_rows_hold_what_ran(tmp_path: Path) -> None:
    rows = measure(plan(tmp_path))
    assert [(r["policy"], r["seed"]) for r in rows] == [
        (policy, seed) for policy in ("reference", "fewer steps", "moeca") for seed in (0, 1)
    ]
    fewer, cached = rows[2], rows[4]
    assert (fewer["calls"], fewer["speedup"]) == (2, 2.0)
    assert cached["calls"] == cached["cached_calls"] == 4
    assert cached["speedup"] == pytest.approx(cached["flops_full"] / cached["flops_computed"])
    assert 1.0 < cached["speedup"] < 2.0
    assert 0 < cached["mse"] < fewer["mse"] * 100
    assert cached["psnr_db"] == pytest.approx(10 * math.log10(4 / cached["mse"]))
    json.dumps(rows, allow_nan=False)


def test_resume_runs_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = {"candidates": [Candidate.parse("steps=3")], "seeds": (0,)}
    first = measure(plan(tmp_path, **two))
    ran: list[list[int]] = []
    generations = Engine.generations

    def watched(self: Engine, sampler: str, candidate: Candidate, seeds: list[int]) -> Any:
        ran.append(list(seeds))
        return generations(self, sampler, candidate, seeds)

    monkeypatch.setattr(Engine, "generations", watched)
    tiny_subject.CALLS.clear()
    again = measure(plan(tmp_path, **two, resume=True))
    assert (again, ran, tiny_subject.CALLS) == (first, [], [])
    measure(plan(tmp_path, **{**two, "seeds": (0, 1)}, resume=True))
    assert ran == [[1], [1]]  # the new seed of both candidates
    measure(plan(tmp_path, **two))
    assert ran[2:] == [[0], [0]]  # everything, when not told to resume


def test_another_setting_is_another_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = measure(plan(tmp_path, seeds=(0,), candidates=[], step_ratios=()))
    monkeypatch.setattr(tiny_subject.Tiny, "settings", {"step": 0.1})
    changed = plan(tmp_path, seeds=(0,), candidates=[], step_ratios=(), resume=True)
    assert measure(changed)[0]["key"] != first["key"]


def test_a_candidate_that_fails_is_told_and_the_rest_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    generations = Engine.generations

    def broken(self: Engine, sampler: str, candidate: Candidate, seeds: list[int]) -> Any:
        if candidate.policy == "moeca":
            raise RuntimeError("no such rows")
        return generations(self, sampler, candidate, seeds)

    monkeypatch.setattr(Engine, "generations", broken)
    with caplog.at_level(logging.WARNING, "moeca_compile.bench"):
        rows = measure(plan(tmp_path, seeds=(0,)))
    assert "moeca interval=2 budget=0.25 failed: no such rows" in caplog.text
    failed = {s.policy: s.error for s in summarise(rows)}
    assert failed == {"fewer steps": None, "moeca": "RuntimeError: no such rows"}
    text, _ = write_results(plan(tmp_path, seeds=(0,)), rows)
    assert "failed: moeca interval=2 budget=0.25: RuntimeError: no such rows" in text


def test_calls_the_backend_did_not_see_count_in_full() -> None:
    with tiny_engine() as engine:
        (made,) = engine.generations("euler", CACHED, [0])
        uncached = engine.reference("euler", 0)
    seen = made.speedup(4)
    half = replace(made, calls=8)
    assert seen > 1 and half.speedup(8) == pytest.approx(2 / (1 + 1 / seen))
    assert uncached.speedup(4) == 1.0
    nothing = replace(made, stats=replace(made.stats, reuse_steps=0, refresh_steps=0))
    with pytest.raises(MoecaError, match="none of 4 calls went through the cache"):
        nothing.speedup(4)


def test_seeds_start_from_nothing() -> None:
    """Seed 1 after another seed and another interval gives what it gives alone."""
    other = Candidate.parse("policy=moeca,interval=4,budget=0.5")
    with tiny_engine() as engine:
        (before,) = engine.generations("euler", other, [0])
        _, after = engine.generations("euler", CACHED, [0, 1])
        (compiled,) = engine._compiled.values()  # the same graphs serve both
        (entry,) = REGISTRY.entries_of(compiled)
        assert isinstance(entry.variants.get("reuse"), GraphModule)  # and are no kernels
    with tiny_engine() as engine:
        (alone,) = engine.generations("euler", CACHED, [1])
    assert torch.equal(after.images, alone.images)
    assert after.stats.to_dict() == alone.stats.to_dict()
    assert before.stats.refresh_steps == 1 and after.stats.refresh_steps == 2


@pytest.mark.slow
@pytest.mark.compile
def test_kernels_give_the_same_images_and_a_time(tmp_path: Path) -> None:
    setting = plan(tmp_path / "kernels", seeds=(0,), engine=INDUCTOR, step_ratios=())
    full, kernels = summarise(measure(setting))
    (graphs,) = summarise(measure(plan(tmp_path / "graphs", seeds=(0,), step_ratios=())))
    assert full.policy == "full" and full.speedup == 1.0 and full.psnr_db > 90
    assert kernels.speedup == pytest.approx(graphs.speedup)
    assert kernels.psnr_db == pytest.approx(graphs.psnr_db, abs=0.01)
    assert graphs.seconds is None and kernels.seconds is not None
    assert kernels.wall_speedup == pytest.approx(full.seconds / kernels.seconds)


def test_subjects_that_lack_something_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MoecaError, match="without samplers, sample"):
        look_at("half", lambda: SimpleNamespace(model=nn.Linear(1, 1)))
    with pytest.raises(MoecaError, match=r"expected a torch.nn.Module, got int"):
        look_at("odd", lambda: SimpleNamespace(model=1, samplers={}, sample=None))
    with pytest.raises(MoecaError, match="no model has a sampler 'heun'; there are euler, other"):
        measure(plan(tmp_path, samplers=["heun"]))


def test_frechet_measures_batches_of_own_seeds(tmp_path: Path) -> None:
    setting = plan(tmp_path, step_ratios=())
    full, cached = frechet_rows(setting, 8)
    assert full["images"] == cached["images"] == 8
    assert full["to_real"] is None and full["to_full"] == pytest.approx(0, abs=1e-9)
    assert 0 <= cached["to_full"] < 0.1 and cached["speedup"] > 1
    assert "fewer than 2000 cannot rank" in frechet_table([full, cached])


def test_command_writes_everything(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [
        "quality", SUBJECT, "--engine", "graph", "--samples", "2", "--seed", "0", "--sampler",
        "euler", "--candidate", "policy=moeca,interval=2,budget=0.25", "--out", str(out),
    ]  # fmt: skip
    result = moeca(*arguments)
    assert result.exit_code == 0
    assert "moeca interval=2 budget=0.25" in result.stdout and "best rival" in result.stdout
    data = json.loads((out / "quality.json").read_text())
    names = [c["name"] for c in data["candidates"]]
    assert "2 steps" in names and "moeca interval=2 budget=0.25" in names
    for metric in ("psnr_db", "psnr_mean_db"):
        assert [v["target"] for v in data["verdicts"] if v["metric"] == metric] == [2.0, 3.0, 4.0]
    for picture in ("pareto.png", "grid.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    again = json.loads(moeca(*arguments, "--resume", "--json").stdout)
    assert again["rows"] == data["rows"]


def test_command_refuses_what_it_cannot_measure(tmp_path: Path) -> None:
    wrong = moeca("quality", SUBJECT, "--candidate", "intervall=2")
    assert wrong.exit_code == 2 and "did you mean 'interval'" in wrong.stderr
    other = moeca("quality", SUBJECT, "--sampler", "heun", "--out", str(tmp_path))
    assert other.exit_code == 2 and "no model has a sampler 'heun'" in other.stderr
