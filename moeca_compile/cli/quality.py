"""`moeca quality MODEL...`: what each policy does to the images, fewer steps included.

moeca quality examples/subjects.py:ditmoe --sampler euler --candidate policy=fora,interval=3
->  out/quality/rows.jsonl, quality.json, pareto.png, grid.png; a table with verdicts
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..bench.candidates import Candidate, Choice, default_candidates, quick_candidates
from ..bench.engine import ENGINES, GRAPH, INDUCTOR
from ..bench.frechet import frechet_rows, frechet_table
from ..bench.output import write_results
from ..bench.plots import need_matplotlib
from ..bench.quality import Plan, measure
from ..bench.subject import Subject, look_at
from ..errors import MoecaError, OptionsError
from .common import emit, found_a_problem, json_flag
from .load import find_factory

QUICK = {"samples": 8, "seeds": (0,), "engine": GRAPH, "step_ratios": (2.0, 3.0, 4.0)}


def _candidates(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[Candidate]:
    try:
        return [Candidate.parse(value) for value in values]
    except OptionsError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--sampler", "samplers", multiple=True, help="Default: all of each model.")
@click.option(
    "--candidate", "candidates", multiple=True, metavar="NAME=VALUE,...", callback=_candidates,
    help="Instead of the default table, e.g. policy=fora,interval=3 or steps=20; repeatable.",
)  # fmt: skip
@click.option("--policy", "policies", multiple=True, help="Only these of the default table.")
@click.option("--samples", type=click.IntRange(1), default=64, show_default=True)
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1), show_default=True)
@click.option(
    "--engine", type=click.Choice(ENGINES), default=INDUCTOR, show_default=True,
    help="graph: no kernels are compiled; same images and counts, no times.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out/quality"),
    show_default=True,
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on with the rows in --out.")
@click.option("--quick", is_flag=True, help="Under two minutes: few of everything, no kernels.")
@click.option(
    "--frechet", type=click.IntRange(2), metavar="N",
    help="Frechet distance of N images (2000 or more) instead of the paired distances.",
)  # fmt: skip
@json_flag
def command(
    models: tuple[str, ...], candidates: list[Candidate], policies: tuple[str, ...], quick: bool,
    frechet: int | None, as_json: bool, **settings: Any,
) -> None:  # fmt: skip
    """Compare policies by images, arithmetic and time, on your own model and sampler.

    MODEL's factory returns an object with .model, .samplers and .sample(); what else it may have:
    python -c "help('moeca_compile.bench.subject')". Exit code 1 if a candidate failed.
    """
    settings["samplers"] = settings["samplers"] or None
    chosen = Choice(tuple(candidates), {})
    if not candidates:
        chosen = quick_candidates() if quick else default_candidates(policies or None)
    if quick:
        settings |= QUICK
    try:
        need_matplotlib()
        subjects = [_subject(model) for model in models]
        plan = Plan(subjects, chosen.candidates, **_first_only(settings, subjects, quick))
        _note_left_out(chosen)
        if frechet is not None:
            rows = frechet_rows(plan, frechet)
            emit(frechet_table(rows), rows, as_json)
            return
        text, data = write_results(plan, measure(plan))
    except MoecaError as error:
        raise click.UsageError(str(error)) from error
    emit(text, data, as_json)
    if any(line["error"] for line in data["candidates"]):
        found_a_problem()


def _subject(spec: str) -> Subject:
    name, make = find_factory(spec)
    return look_at(name, make)


def _first_only(settings: dict[str, Any], subjects: list[Subject], quick: bool) -> dict[str, Any]:
    """--quick without --sampler: the first sampler of the models."""
    if quick and settings["samplers"] is None:
        return settings | {
            "samplers": tuple(dict.fromkeys(next(iter(s.samplers)) for s in subjects))
        }
    return settings


def _note_left_out(chosen: Choice) -> None:
    for name, why in chosen.left_out.items():
        click.echo(f"left out: {name}: {why}", err=True)
    if not chosen.candidates:
        click.echo("nothing but fewer steps is measured", err=True)
