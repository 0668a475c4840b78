"""`moeca demo`: the demonstration of a checkout, `examples/demo.py`, as `make demo` runs it.

moeca demo  ->  a table; out/demo/samples.png, summary.json, details.json
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import click

import moeca_compile

from .common import json_flag

CHECKOUT = Path(moeca_compile.__file__).parents[1]


@click.command()
@json_flag
def command(as_json: bool) -> None:
    """Sample from a trained model eager, with Inductor and with moeca (from a checkout)."""
    script = CHECKOUT / "examples" / "demo.py"
    if not script.is_file():
        raise click.UsageError(
            "the demo's model is not part of the installed package: clone the repository, then "
            "`pip install -e .` or `make demo`"
        )
    sys.path.insert(0, str(script.parent))
    if not as_json:
        runpy.run_path(str(script), run_name="__main__")
        return
    shown, sys.stdout = sys.stdout, sys.stderr  # the tables; JSON alone goes to stdout
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.stdout = shown
    summary = json.loads((CHECKOUT / "out" / "demo" / "summary.json").read_text())
    click.echo(json.dumps(summary, indent=2))
