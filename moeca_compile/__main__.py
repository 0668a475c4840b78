"""`python -m moeca_compile` and the script `moeca`: the command line, or what is missing for it.

moeca explain model.py:build        moeca env --json
(without click)  ->  moeca: the command line needs click: pip install "moeca-compile[cli]"
"""

from __future__ import annotations

import importlib.util
import sys

NEEDED = ("click", "tqdm")


def main() -> None:
    """Run the command line. Exit codes: see `moeca_compile/cli/__init__.py`."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        needs = " and ".join(missing)
        message = f'moeca: the command line needs {needs}: pip install "moeca-compile[cli]"'
        print(message, file=sys.stderr)
        raise SystemExit(2)
    from .cli import cli

    cli(prog_name="moeca")


if __name__ == "__main__":
    main()
