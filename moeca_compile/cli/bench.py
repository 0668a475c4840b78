"""`moeca bench [MODEL]`: what a step costs, eager, Inductor and this backend taking turns.

moeca bench small --batch 8 --steps 50        moeca bench my_model.py:factory
->  out/bench/small/bench.json, bench.png; two tables, losing rows included
moeca bench small --rows                      cost of a reuse step against the share computed
->  out/bench/small/rows.json, rows.png
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from ..bench.plots import need_matplotlib
from ..errors import MoecaError
from ..speed.candidates import choose
from ..speed.figures import figures
from ..speed.machine import describe, machine
from ..speed.measure import Plan, WorkerFailed, measure, steps_of
from ..speed.networks import SIZES
from ..speed.plots import draw_bars, draw_rows
from ..speed.rows import CANDIDATE, SHARES, measure_rows
from ..speed.table import rows_table, table
from ..speed.workload import DTYPES, Sizes, load
from .common import emit, found_a_problem, json_flag, progress

QUICK_SIZES = {"batch": 2, "steps": 5, "depth": 2}


@click.command()
@click.argument("model", metavar="[MODEL]", default="small")
@click.option(
    "--candidate", "texts", multiple=True, metavar="NAME=VALUE,...",
    help="Options of this backend to measure instead of the defaults; repeatable.",
)  # fmt: skip
@click.option("--policy", "policies", multiple=True, help="Short for --candidate policy=NAME.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True)
@click.option("--steps", type=click.IntRange(2), default=8, show_default=True)
@click.option("--depth", type=click.IntRange(1), help="Blocks, instead of the configuration's.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Default: as the model comes.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Default: what torch takes.")
@click.option("--mode", help="Of torch.compile, for everything compiled, e.g. reduce-overhead.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--rows", is_flag=True, help="Cost of a reuse step at 0 to 50 % instead.")
@click.option("--quick", is_flag=True, help="Depth 2, batch 2, 5 steps, one round, one start.")
@click.option(
    "--engine", type=click.Choice(["inductor", "graph"]), default="inductor", show_default=True,
    help="graph: no kernels are compiled; checks a set-up, its times mean nothing.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out/bench"),
    show_default=True,
)  # fmt: skip
@json_flag
def command(
    model: str, texts: tuple[str, ...], policies: tuple[str, ...], rows: bool, quick: bool,
    engine: str, out: Path, as_json: bool, **settings: Any,
) -> None:  # fmt: skip
    """Time, memory and arithmetic of a step: eager, Inductor, and this backend.

    MODEL is a configuration (small, base, xl, sigmoid-16, sigmoid-48, ...) or file.py:factory.
    Exit codes: 0 everything was measured, 1 a candidate failed, 2 the command could not run.
    """
    try:
        need_matplotlib()
        sizes, settings = _sizes(settings, quick)
        if settings["threads"]:
            torch.set_num_threads(settings["threads"])
        peers = [] if rows else sorted(_peers(model, sizes))
        named = [*texts, *(f"policy={name}" for name in policies)]
        candidates = [CANDIDATE] if rows else choose(named, peers)
        folder = out / "".join(c if c.isalnum() or c in "-_" else "_" for c in model)
        plan = Plan(
            model, candidates, sizes, folder,
            kernels=engine == "inductor", compile_twice=not quick, **settings,
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        text, data, failed = (_rows if rows else _bench)(plan)
    except (MoecaError, WorkerFailed) as error:
        raise click.UsageError(str(error)) from error
    emit(text, data, as_json)
    if failed:
        found_a_problem()


def _sizes(settings: dict[str, Any], quick: bool) -> tuple[Sizes, dict[str, Any]]:
    """Settings of the workload, and the rest."""
    names = [field.name for field in dataclasses.fields(Sizes)]
    given = {name: settings.pop(name) for name in names}
    if torch.device(given["device"]).type == "cuda" and not torch.cuda.is_available():
        raise MoecaError(f"--device {given['device']}: torch sees no CUDA device here")
    if quick:
        given, settings["rounds"] = {**given, **QUICK_SIZES}, 1
    return Sizes(**given), settings


def _peers(model: str, sizes: Sizes) -> dict[str, Any]:
    """What a factory brings along; it also fails here, before any process is started."""
    if ":" not in model:
        if model not in SIZES:
            load(model, sizes)  # raises, naming the nearest
        return {}
    return load(model, sizes).peers


def _bench(plan: Plan) -> tuple[str, dict[str, Any], bool]:
    plan, measured = _shown(plan, measure, steps_of(plan))
    rows = figures(measured)
    where = machine(plan.sizes.device)
    head = _head(plan, where)
    data = _data(plan, where) | {
        "candidates": [row.to_dict() for row in rows],
        "raw": [
            {"name": m.candidate.name, "options": m.candidate.options,
             "generations": [dataclasses.asdict(g) for g in m.generations]}
            for m in measured
        ],
    }  # fmt: skip
    draw_bars(rows, head, plan.out / "bench.png")
    return _written(plan, "bench.json", table(rows, head), data), data, any(r.error for r in rows)


def _rows(plan: Plan) -> tuple[str, dict[str, Any], bool]:
    plan, costs = _shown(plan, measure_rows, 1 + plan.rounds * len(SHARES))
    where = machine(plan.sizes.device)
    head = _head(plan, where)
    data = _data(plan, where) | costs.to_dict()
    draw_rows(costs, head, plan.out / "rows.png")
    return _written(plan, "rows.json", rows_table(costs, head), data), data, False


def _shown(plan: Plan, work: Callable[[Plan], Any], total: int) -> tuple[Plan, Any]:
    with progress(plan.model, total=total, unit="part") as stages:
        plan = dataclasses.replace(plan, on_step=stages.enter)
        return plan, work(plan)


def _head(plan: Plan, where: dict[str, Any]) -> str:
    sizes = {k: v for k, v in dataclasses.asdict(plan.sizes).items() if v is not None}
    shown = ", ".join(f"{name} {value}" for name, value in sizes.items())
    return f"{plan.model}: {shown}, rounds {plan.rounds}\n{describe(where)}"


def _data(plan: Plan, where: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": plan.model,
        "sizes": dataclasses.asdict(plan.sizes),
        "rounds": plan.rounds,
        "mode": plan.mode,
        "kernels": plan.kernels,
        "machine": where,
    }


def _written(plan: Plan, name: str, text: str, data: dict[str, Any]) -> str:
    (plan.out / name).write_text(json.dumps(data, indent=2) + "\n")
    return f"{text}\n\nwrote {plan.out / name}"
