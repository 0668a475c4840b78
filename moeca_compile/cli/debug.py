"""`moeca debug MODEL`: full and cached side by side; the first layer and step where they part.

moeca debug model.py:Sampler -o tau=0.8 --bound 0.1
"""

from __future__ import annotations

from typing import Any

import click

from ..debug.side_by_side import compare
from ..options import Options
from .common import emit, found_a_problem, json_flag, model_argument, option_values, progress
from .load import load_subject


@click.command()
@model_argument
@option_values
@click.option(
    "--bound", type=click.FloatRange(min=0), default=0.1, show_default=True,
    help="Relative difference of a layer's output at which the runs have parted.",
)  # fmt: skip
@json_flag
def command(model: str, options: dict[str, Any], bound: float, as_json: bool) -> None:
    """Run everything computed and cached side by side; exit code 1 if a layer parts.

    MODEL's factory returns an object with .model and .generate(). Both runs get the same inputs at
    every step, so a difference is the cache's own.
    """
    with progress("loading", unit="step") as stages:
        subject = load_subject(model)
        chosen = Options.parse({**subject.options, **options})
        call = (subject.args, subject.kwargs)
        found = compare(
            subject.model, call, subject.generate, chosen, bound=bound, on_step=stages.step
        )
    emit(str(found), found.to_dict(), as_json)
    if found.first is not None or not found.steps:
        found_a_problem()
