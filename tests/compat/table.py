"""The table: `python tests/compat/table.py [--inductor] [--format github] [NAME ...]`.

A row per case whose name contains one of the words given. Graphs run as lowered graphs, in seconds
a case; with --inductor kernels are compiled, in minutes a case. Cases of public repositories need
MOECA_THIRDPARTY, see checkouts.py; without it their row says so.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":  # `tests` is on the path when pytest runs
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import moeca_compile.backend as backend_module
from compat.case import Case
from compat.cases import CASES
from graph_runs import use_graph_level
from moeca_compile.debug.compat import CompatRow, compare, table


def run_as_graphs(patch: pytest.MonkeyPatch) -> None:
    """Variants run as lowered graphs, what is not cached as Dynamo's graph: nothing is compiled."""
    use_graph_level(patch)
    patch.setattr(backend_module, "inductor_fallback", lambda gm, *_: gm.forward)
    patch.setattr(backend_module, "_inductor_later", lambda gm, _: gm.forward)


def row_of(case: Case) -> CompatRow:
    """The row of one case; a skipped one has the reason in its last column."""
    name = f"{case.name} [{case.idiom}, {case.source} {case.version}]".replace(" ]", "]")
    regions = case.moe + case.attention
    try:
        model, calls = case.build()
    except pytest.skip.Exception as reason:
        return CompatRow(name, None, None, 0, regions, None, 0, str(reason))
    successive = [((), call) for call in calls]
    return compare(name, model, successive, expected_regions=regions, options=case.options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--inductor", action="store_true")
    parser.add_argument("--format", default="simple")
    given = parser.parse_args()
    chosen = [c for c in CASES if not given.names or any(n in c.name for n in given.names)]
    with pytest.MonkeyPatch.context() as patch:
        if not given.inductor:
            run_as_graphs(patch)
        rows = []
        for case in chosen:
            with contextlib.redirect_stdout(sys.stderr):  # models print what they are made of
                rows.append(row_of(case))
            print(table(rows[-1:], "plain"), file=sys.stderr, flush=True)
    print(table(rows, given.format))


if __name__ == "__main__":
    main()
