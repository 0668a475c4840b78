"""A folder of models to compare, one row each: `tests/compat` of a checkout, or a user's own.

FOLDER/cases/__init__.py:  CASES = [case, ..]          its parent is put on the path for that
for row in compare_cases(load_cases(FOLDER)): print(table([row]))
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ..torch_compat import without_kernels
from .compat import BUILD, CompatRow, compare


class Absent(Exception):
    """A case cannot be built on this machine; the message says what is missing."""


class SuiteCase(Protocol):
    """What a suite's CASES hold. regions: how many the model has; version: of its source."""

    @property
    def name(self) -> str: ...
    @property
    def idiom(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def regions(self) -> int: ...
    @property
    def options(self) -> dict[str, Any]: ...

    def built(self) -> tuple[nn.Module, Sequence[dict[str, Any]]]:
        """The model and the keyword arguments of successive calls. Raises Absent."""
        ...


def load_cases(folder: Path) -> list[SuiteCase]:
    """The CASES of a suite. Raises FileNotFoundError or ImportError that say what is missing."""
    if not (folder / "cases" / "__init__.py").is_file():
        raise FileNotFoundError(
            f"no suite in {folder}: expected {folder / 'cases' / '__init__.py'} with CASES; "
            "tests/compat of a checkout is one"
        )
    place = folder.resolve()
    for path in (place.parent.parent, place.parent):
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
    return list(importlib.import_module(f"{place.name}.cases").CASES)


def compare_cases(cases: Sequence[SuiteCase], *, kernels: bool = False) -> Iterator[CompatRow]:
    """A row a case, as soon as it is known; an absent one says what is missing.

    kernels: compile them, minutes a case; else graphs run as they are. What models print goes to
    stderr.
    """
    for case in cases:
        level = contextlib.nullcontext() if kernels else without_kernels()
        with contextlib.redirect_stdout(sys.stderr), level:
            yield _row(case)


def _row(case: SuiteCase) -> CompatRow:
    version = f"{case.source} {case.version}".strip()
    try:
        model, calls = case.built()
    except Absent as missing:
        why = str(missing)
        return CompatRow(case.name, None, None, 0, case.regions, None, 0, why, case.idiom, version)
    except Exception as error:  # third-party code; the other rows must not be lost over it
        why = f"{BUILD}{type(error).__name__}: {error}"
        return CompatRow(case.name, None, None, 0, case.regions, None, 0, why, case.idiom, version)
    return compare(
        case.name,
        model,
        [((), call) for call in calls],
        expected_regions=case.regions,
        options=case.options,
        idiom=case.idiom,
        version=version,
    )
