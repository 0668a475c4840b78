"""The command line. A command is one file here with a `command`, and its name in COMMANDS.

    moeca COMMAND FILE.py:factory [-o name=value] [--json]

Exit codes: 0 it went well; 1 the command ran and found a problem (nothing matched, two runs
parted); 2 it could not run (wrong usage, a model that does not load, a missing extra).
Results go to stdout, progress and messages to stderr.
"""

from __future__ import annotations

import importlib

import click

from ..errors import name_nearest

COMMANDS = (
    "env", "explain", "compat", "dump", "report", "debug", "bench", "quality", "calibrate", "demo",
)  # fmt: skip


class Commands(click.Group):
    """Imports a command's file when it is asked for, so that one's extras are no other's need."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of COMMANDS, the one of a session's work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The `command` of `cli/<name>.py`. Raises UsageError naming the nearest one."""
        if cmd_name not in COMMANDS:
            nearest = name_nearest(cmd_name, COMMANDS)
            raise click.UsageError(f"no command {cmd_name!r}{nearest}", ctx)
        return importlib.import_module(f"{__name__}.{cmd_name}").command


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Look into what the `moeca` backend makes of a model.

    MODEL is module:factory or file.py:factory; `moeca explain --help` says what the factory
    returns. Exit codes: 0 fine, 1 a problem was found, 2 the command could not run.
    """
