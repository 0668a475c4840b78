"""`moeca compat [MODEL ...]`: what torch.compile makes of models, and what this backend does.

moeca compat my_models.py:tiny my_models.py:large --markdown
moeca compat --suite tests/compat --only grouped --only eager
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ..debug.compat import CompatRow, compare, table
from ..debug.compat_suite import SuiteCase, compare_cases, load_cases
from ..torch_compat import without_kernels
from .common import Stages, emit, found_a_problem, json_flag, option_values, progress
from .load import load_subject

SUITE = Path("tests/compat")


@click.command()
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option("--suite", type=click.Path(path_type=Path), help=f"A folder of cases; {SUITE}.")
@click.option("--only", multiple=True, metavar="WORD", help="Cases whose name has it.")
@click.option("--kernels", is_flag=True, help="Compile kernels: minutes a model.")
@click.option("--markdown", is_flag=True, help="Print Markdown.")
@option_values
@json_flag
def command(
    models: tuple[str, ...],
    suite: Path | None,
    only: tuple[str, ...],
    kernels: bool,
    markdown: bool,
    options: dict[str, Any],
    as_json: bool,
) -> None:
    """Graphs, regions, error without caching and reuse, one row a model; 1 if a row is not good.

    MODEL is module:factory or file.py:factory, as for `moeca explain`. Without one the cases of a
    suite run: those of a checkout, or of the folder given. Models that are not installed have a row
    that says so and count as no problem.
    """
    if models and suite is not None:
        raise click.UsageError("give models or --suite, not both")
    rows: list[CompatRow] = []
    cases = [] if models else _cases(suite or SUITE, only)
    with progress("comparing", total=len(models) or len(cases), unit="model") as stages:
        found = (
            _given(models, options, kernels, stages) if models else _each(cases, kernels, stages)
        )
        rows.extend(found)
    emit(table(rows, "github" if markdown else "simple"), [r.to_dict() for r in rows], as_json)
    if not all(row.good or row.absent for row in rows):
        found_a_problem()


def _cases(folder: Path, only: tuple[str, ...]) -> list[SuiteCase]:
    try:
        cases = load_cases(folder)
    except (FileNotFoundError, ImportError) as error:
        raise click.UsageError(str(error)) from error
    chosen = [c for c in cases if not only or any(word in c.name for word in only)]
    if not chosen:
        raise click.UsageError(f"no case of {folder} has {' or '.join(only)} in its name")
    return chosen


def _each(cases: list[SuiteCase], kernels: bool, stages: Stages) -> Iterator[CompatRow]:
    for case in cases:
        stages.enter(case.name)
        yield from compare_cases([case], kernels=kernels)


def _given(
    models: tuple[str, ...], options: dict[str, Any], kernels: bool, stages: Stages
) -> Iterator[CompatRow]:
    for spec in models:
        stages.enter(spec)
        subject = load_subject(spec)
        chosen = {**subject.options, **options}
        with contextlib.nullcontext() if kernels else without_kernels():
            yield compare(spec, subject.model, [(subject.args, subject.kwargs)], options=chosen)
