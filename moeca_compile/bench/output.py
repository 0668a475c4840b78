"""Writes what a run found: quality.json, pareto.png, grid.png; returns the table as text.

text, data = write_results(plan, measure(plan))
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..options import Options
from .plots import draw_grid, draw_pareto
from .quality import Plan
from .store import Row, sources_digest, versions
from .summary import summarise
from .table import table
from .verdict import METRICS, OURS_FROM, RIVALS_FROM, TOLERANCE_DB, judge


def write_results(plan: Plan, rows: Sequence[Row]) -> tuple[str, dict[str, Any]]:
    """(table, the content of quality.json)."""
    default = Options().policy
    summaries = summarise(rows)
    verdicts = [v for metric in METRICS for v in judge(summaries, default, metric=metric)]
    draw_pareto(summaries, plan.out / "pareto.png")
    draw_grid(plan, rows, summaries, plan.out / "grid.png")
    data = {
        "setting": _setting(plan),
        "default_policy": default,
        "verdicts": [verdict.to_dict() for verdict in verdicts],
        "candidates": [summary.to_dict() for summary in summaries],
        "rows": list(rows),
    }
    (plan.out / "quality.json").write_text(json.dumps(data, indent=1) + "\n")
    written = ", ".join(str(plan.out / n) for n in ("quality.json", "pareto.png", "grid.png"))
    text = "\n\n".join([table(summaries, verdicts, default), _note(plan), f"wrote {written}"])
    return text, data


def _note(plan: Plan) -> str:
    seeds = ", ".join(map(str, plan.seeds))
    times = "no times: no kernels were compiled" if plan.engine == "graph" else "seconds: best warm"
    load, cores = machine()["load"], os.cpu_count()
    return (
        f"{plan.samples} samples, seeds {seeds}, engine {plan.engine} ({times} generation; "
        f"load {load} on {cores} cores)"
    )


def _setting(plan: Plan) -> dict[str, Any]:
    return {
        "samples": plan.samples,
        "seeds": list(plan.seeds),
        "engine": plan.engine,
        "verdict_rule": {
            "ours_from": OURS_FROM, "rivals_from": RIVALS_FROM, "tolerance_db": TOLERANCE_DB,
        },
        "versions": versions(),
        "sources": sources_digest(),
        "machine": machine(),
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """What a time depends on; the load tells whether anything else ran."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
    }
