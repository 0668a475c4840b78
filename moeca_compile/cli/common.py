"""What every command shares: MODEL, -o name=value, --json, output, and progress on stderr.

@click.command()
@model_argument
@option_values
@json_flag
def command(model: str, options: dict[str, Any], as_json: bool) -> None: ...
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import click
from tqdm import tqdm

from ..errors import OptionsError
from ..options import Options

FOUND_A_PROBLEM = 1
F = TypeVar("F", bound=Callable[..., Any])


def _parse_options(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict:
    given: dict[str, Any] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals:
            raise click.BadParameter(f"{value!r}: expected name=value, e.g. -o interval=4")
        try:
            given[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            given[name] = text
    try:
        Options.parse(given)
    except OptionsError as error:
        raise click.BadParameter(str(error)) from error
    return given


def model_argument(command: F) -> F:
    """MODEL as `module:factory` or `file.py:factory`; see cli/load.py."""
    return click.argument("model", metavar="MODEL")(command)


def option_values(command: F) -> F:
    """`-o name=value`, any number of times, as a dict the backend accepts."""
    return click.option(
        "-o", "--option", "options", multiple=True, metavar="NAME=VALUE", callback=_parse_options,
        help="An option of the backend, e.g. -o budget=0.1; may be repeated.",
    )(command)  # fmt: skip


def json_flag(command: F) -> F:
    """`--json`: the result as one JSON value on stdout."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def emit(text: str, data: Any, as_json: bool) -> None:
    """The result on stdout: text for people or the same as JSON."""
    click.echo(json.dumps(data, indent=2, default=str) if as_json else text)


def found_a_problem() -> NoReturn:
    """Leave with the exit code that says so; what it is has been printed."""
    raise SystemExit(FOUND_A_PROBLEM)


class Stages:
    """A line on stderr that names the stage a command is in and the seconds since it began."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def enter(self, name: str) -> None:
        """The next stage begins."""
        self._bar.set_description(name)
        self._bar.update(1)

    def step(self, *_: Any) -> None:
        """One more of the things the current stage counts."""
        self._bar.update(1)


@contextmanager
def progress(first: str, total: int | None = None, unit: str = "stage") -> Iterator[Stages]:
    """Shown from the second second on, and on a terminal only."""
    with tqdm(
        total=total, desc=first, unit=unit, delay=2, leave=False, file=sys.stderr, disable=None
    ) as bar:
        yield Stages(bar)
