"""Runs a command in this process, as a terminal would.

result = moeca("explain", "subjects.py:pair", "--json")
result.exit_code, result.stdout, result.stderr
"""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from moeca_compile.cli import cli

SUBJECTS = Path(__file__).parent / "subjects.py"


def moeca(*args: str) -> Result:
    """Exceptions that are no exit come through."""
    return CliRunner().invoke(cli, args, catch_exceptions=False)
