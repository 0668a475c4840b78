"""Where the benchmarks write what they measured.

save("start_up", arguments, rows=rows, raw=raw)  ->  out/benchmarks/start_up.json
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from models import ROOT, machine

OUT = ROOT / "out" / "benchmarks"


def save(name: str, arguments: argparse.Namespace, **found: Any) -> None:
    """Write `found` below the command's arguments and the machine, and say where."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{name}.json"
    result = {"arguments": vars(arguments), "machine": machine(), **found}
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")
