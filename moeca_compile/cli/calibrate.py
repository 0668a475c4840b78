"""`moeca calibrate MODEL --speedup 3 --out policy.json`: options that reach a target, in a file.

moeca calibrate model.py:Sampler --psnr-db 40 --minutes 5 --out policy.json
->  what was reached, also on a seed not searched with; the trade-offs that nothing else beats
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from ..calibration.calibrate import calibrate
from ..calibration.measure import METRICS, Generate
from ..errors import MoecaError
from .common import emit, found_a_problem, json_flag, model_argument, option_values, progress
from .load import Subject, load_subject


@click.command()
@model_argument
@option_values
@click.option("--speedup", type=float, help="Reach this, with the best PSNR there is.")
@click.option("--psnr-db", type=float, help="Reach this, as fast as possible.")
@click.option("--minutes", type=float, default=10.0, show_default=True, help="Time for all of it.")
@click.option("--seeds", default="0,1", show_default=True, help="Searched with, by comma.")
@click.option("--metric", type=click.Choice(METRICS), default=METRICS[0], show_default=True)
@click.option("--policy", "policies", multiple=True, help="Search this one only; may be repeated.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("policy.json"),
    show_default=True, help='The file that options={"policy_file": ...} reads.',
)  # fmt: skip
@json_flag
def command(
    model: str,
    options: dict[str, Any],
    speedup: float | None,
    psnr_db: float | None,
    minutes: float,
    seeds: str,
    metric: str,
    policies: tuple[str, ...],
    out: Path,
    as_json: bool,
) -> None:
    """Search policies and options that reach --speedup or --psnr-db on your own samples.

    MODEL's factory returns an object with .model and .generate(); where generate() takes a `seed`
    it gets one, else torch's generator is seeded before it. Exit code 1 if the target was missed.
    """
    given = {"speedup": speedup, "psnr_db": psnr_db}
    target = {name: value for name, value in given.items() if value is not None}
    if len(target) != 1:
        raise click.UsageError("give one of --speedup and --psnr-db")
    with progress("calibrating", unit="setting") as stages:
        subject = load_subject(model)
        try:
            found = calibrate(
                subject.model, sampler(subject), target, budget_minutes=minutes,
                seeds=_numbers(seeds), save=out, metric=metric, policies=policies or None,
                options={**subject.options, **options}, on_trial=stages.step,
            )  # fmt: skip
        except MoecaError as error:
            raise click.UsageError(str(error)) from error
    emit(f"{found}\n{out}", found.file.to_dict(), as_json)
    if not found.reached:
        found_a_problem()


def sampler(subject: Subject) -> Generate:
    """The subject's `generate()` as a function of a model and a seed."""
    generator = subject.generator
    if generator is None:
        raise click.UsageError(
            "this command samples: let the factory return an object with .model and .generate()"
        )
    seeded = "seed" in inspect.signature(generator.generate).parameters

    def generate(model: Any, seed: int) -> Tensor:
        own, generator.model = generator.model, model
        torch.manual_seed(seed)
        try:
            return generator.generate(seed=seed) if seeded else generator.generate()
        finally:
            generator.model = own

    return generate


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise click.UsageError(f"--seeds {text!r}: expected integers, e.g. 0,1") from error
