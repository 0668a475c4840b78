"""Workloads, one worker in this process, and the command end to end (slow)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moeca_compile
from cli.commands import moeca
from moeca_compile.errors import MoecaError
from moeca_compile.speed.candidates import BUDGETED, EAGER, MOECA, Candidate
from moeca_compile.speed.networks import SIZES, Network, build, call
from moeca_compile.speed.worker import Job, Runner
from moeca_compile.speed.workload import Sizes, load
from moeca_compile.torch_compat import without_kernels

WORKLOADS = Path(__file__).parent / "workloads.py"
PUBLISHED = {"small": 199, "base": 796, "xl": 4168}  # millions of parameters


@pytest.mark.parametrize("name", SIZES)
def test_a_configuration_is_whole_on_paper(name: str) -> None:
    with torch.device("meta"):
        network = Network(SIZES[name])
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    assert round(millions) == PUBLISHED.get(name, round(millions))
    routed = [hasattr(block.mlp, "router") for block in network.blocks]
    assert routed[-1] and sum(routed) * SIZES[name].every == SIZES[name].depth


@pytest.mark.parametrize("name", ["tiny", pytest.param("tiny-sigmoid", marks=pytest.mark.slow)])
def test_the_networks_are_matched_and_nothing_in_them_is_silent(name: str) -> None:
    size = replace(SIZES[name], depth=1)
    model = build(size)
    assert all(p.any() for p in model.parameters())
    report = moeca_compile.explain(model, *call(size, 2))
    assert report.matched and report.graph_breaks == 0
    assert [r.kind for r in report.regions if r.matched] == ["moe", "attention"] * size.depth


def test_router_weights_of_the_sigmoid_networks_sum_to_their_scale() -> None:
    size = SIZES["tiny-sigmoid"]
    ids, weights = build(size).blocks[0].mlp.router(torch.randn(5, size.dim))  # type: ignore[union-attr, operator]
    assert ids.shape == (5, 2) and torch.allclose(weights.sum(1), torch.full((5,), 2.5))


def test_a_named_workload_drifts_and_falls() -> None:
    made = load("tiny", Sizes(batch=4, steps=3, dtype="bfloat16"))
    (x0, t0, y0), (x1, t1, y1) = (made.calls[i][0] for i in (0, 1))
    assert len(made.calls) == 3 and x0.dtype == torch.bfloat16 and t0.dtype == torch.float32
    assert not x0.equal(x1) and x0[:2].equal(x0[2:]) and y0.equal(y1)
    assert (t1 < t0).all()
    with pytest.raises(MoecaError, match="even number"):
        load("tiny", Sizes(batch=3))
    with pytest.raises(MoecaError, match="did you mean 'tiny'"):
        load("tinny", Sizes())


def test_a_factory_of_one_call_gets_a_trajectory() -> None:
    made = load(f"{WORKLOADS}:pair", Sizes(steps=4))
    kwargs = [kwargs for _, kwargs in made.calls]
    assert len(kwargs) == 4 and not kwargs[0]["x"].equal(kwargs[3]["x"])
    assert kwargs[3]["t"][0] < kwargs[0]["t"][0] and kwargs[0]["y"].equal(kwargs[3]["y"])
    with pytest.raises(MoecaError, match="found no timestep"):
        load(f"{WORKLOADS}:no_timestep", Sizes())


def test_a_sampler_is_followed_once_and_copied() -> None:
    made = load(f"{WORKLOADS}:Sampler", Sizes(steps=99))
    assert len(made.calls) == 3 and set(made.peers) == {"twice", "missing"}
    assert not made.calls[0][0][0].equal(made.calls[1][0][0]), "written in place, kept apart"


@pytest.mark.slow
def test_both_counters_agree_and_steps_are_named(tmp_path: Path) -> None:
    """Eager arithmetic counted by torch, ours by this package; and what every step was."""
    sizes = Sizes(batch=2, steps=5, depth=1)

    def runner(kind: str) -> Runner:
        candidate = Candidate("one", kind, BUDGETED if kind == MOECA else {})
        return Runner(Job("tiny", candidate, sizes, str(tmp_path), kernels=False))

    eager = runner(EAGER)
    assert eager.warm_up().steps == 5
    with without_kernels():
        ours = runner(MOECA)
        ours.warm_up()
        made = ours.generation({"budget": 0.5})
    assert made.kinds == ["refresh", "reuse", "reuse", "reuse", "refresh"]
    assert made.computed == pytest.approx(0.5)
    full, done = eager.finish(), ours.finish()
    assert done.flops_full == pytest.approx(full.flops, rel=1e-6)
    assert done.flops is not None and full.flops is not None and done.flops < full.flops
    assert done.cache_bytes > 0 and done.peak_bytes > 0


@pytest.mark.slow
def test_the_command_end_to_end(tmp_path: Path) -> None:
    arguments = ("--engine", "graph", "--quick", "--out", str(tmp_path), "--json")
    result = moeca("bench", f"{WORKLOADS}:Sampler", *arguments, "--candidate", "budget=0.2")
    assert result.exit_code == 1, "a candidate failed"
    (folder,) = tmp_path.iterdir()
    told = json.loads((folder / "bench.json").read_text())
    assert told == json.loads(result.stdout)
    rows = {row["name"]: row for row in told["candidates"]}
    assert rows.pop("missing")["error"] == "ImportError: no peer here"
    assert all(row["ms_step"] > 0 and row["peak_bytes"] > 0 for row in rows.values())
    assert rows["twice"]["ms_step"] > rows["eager"]["ms_step"] * 0.5
    assert told["machine"]["torch"] == torch.__version__
    assert (folder / "bench.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.compile
def test_rows_and_warm_start_with_kernels(tmp_path: Path) -> None:
    sizes = ("--depth", "1", "--batch", "2", "--steps", "5", "--rounds", "1")
    result = moeca("bench", "tiny", "--rows", *sizes, "--out", str(tmp_path), "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    computed = [point["computed"] for point in told["points"]]
    assert computed == sorted(computed) and computed[-1] == pytest.approx(0.5)
    assert (tmp_path / "tiny" / "rows.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smal",), "did you mean 'small'"),
        (("tiny", "--device", "cuda"), "no CUDA device"),
        (("tiny", "--candidate", "budgets=1"), "did you mean 'budget'"),
    ],
)
def test_wrong_usage_is_two(arguments: tuple[str, ...], message: str) -> None:
    result = moeca("bench", *arguments)
    assert result.exit_code == 2 and message in result.stderr and not result.stdout
