"""`moeca explain MODEL`: what would be cached, what not and why, what it will cost.

moeca explain examples/model.py:build -o budget=0.1 --markdown
"""

from __future__ import annotations

from typing import Any

import click

from ..debug.explain import Analyser, explain_with
from ..options import Options
from .common import emit, found_a_problem, json_flag, model_argument, option_values, progress
from .load import load_subject


@click.command()
@model_argument
@option_values
@click.option("--markdown", is_flag=True, help="Print Markdown.")
@json_flag
def command(model: str, options: dict[str, Any], markdown: bool, as_json: bool) -> None:
    """What would be cached, what not and why; exit code 1 if a layer is not.

    MODEL is module:factory or file.py:factory. factory() returns (model, inputs), inputs being a
    tuple of positional or a dict of keyword arguments of one call; or an object with .model,
    .generate() and, if wanted, .options.
    """
    with progress("loading", total=2) as stages:
        subject = load_subject(model)
        stages.enter("analysing")
        chosen = Options.parse({**subject.options, **options})
        report = explain_with(Analyser(chosen), subject.model, subject.args, subject.kwargs)
    emit(report.to_markdown() if markdown else str(report), report.to_dict(), as_json)
    if not report.matched:
        found_a_problem()
