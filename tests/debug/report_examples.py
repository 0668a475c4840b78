"""Report data of the size the report has to stay legible at: 50 steps, 28 layers, 64 experts."""

from __future__ import annotations

import random
from typing import Any

STEPS, LAYERS, EXPERTS, NODES = 50, 28, 64, 70


def large_report() -> dict[str, Any]:
    """What `report_data` returns, invented, plus what `report` adds."""
    draw = random.Random(0)
    names = [f"transformer.blocks.{i}.moe" for i in range(LAYERS)]
    steps = [_step(i) for i in range(STEPS)]
    reuse = [s["kind"] == "reuse" for s in steps]
    maps = {
        "computed": [[draw.random() if r else 1.0 for _ in names] for r in reuse],
        "unmatched": [[0.2 * draw.random() if r else None for _ in names] for r in reuse],
        "drift": [[draw.random() if i else None for _ in names] for i in range(STEPS)],
    }
    entry = {
        "name": "4x16x64x64",
        "layers": names,
        "steps": steps,
        "forgotten": 0,
        "maps": {k: [[v and round(v, 4) for v in row] for row in m] for k, m in maps.items()},
        "experts": [_expert(name, e, draw) for name in names for e in range(EXPERTS)],
        "memory": {
            "kinds": {"branch": 900_000_000, "key_value": 300_000_000, "slot": 9_000_000},
            "lane_bytes": 1_209_000_000, "held_bytes": 2_418_000_000, "lanes": 2,
        },
        "compile_seconds": {"refresh": 40.0, "reuse": 90.0},
        "graph": [_node(name, n) for name in names for n in range(NODES)],
    }  # fmt: skip
    summary = {
        "steps": STEPS, "refresh": reuse.count(False), "reuse": reuse.count(True), "plain": 0,
        "generations": 1, "lanes": 2, "branches": 0.41, "tokens": 0.5, "speedup_flops": 2.2,
        "cache_bytes": 2_418_000_000, "dropped": 3, "unmatched": 1200,
        "reasons": {"interval": 12, "new_lane": 1}, "events": [],
    }  # fmt: skip
    totals = {"branches": 0.4, "tokens": 0.5, "unmatched": 40, "dropped": 0, "speedup": 2.2}
    return {
        "summary": summary,
        "layers": [{"name": name, **totals} for name in names],
        "options": {"policy": "moeca", "interval": 4, "tau": 0.8, "budget": None},
        "entries": [entry],
        "images": [],
        "maps": list(maps),
    }


def _step(number: int) -> dict[str, Any]:
    kind = "reuse" if number % 4 else "refresh"
    return {
        "number": number, "kind": kind, "reason": "policy" if number % 4 else "interval",
        "lane": number % 2, "generation": 0, "step": number // 2, "timestep": 1 - number / STEPS,
        "starts": number < 2, "evidence": (number % 7) / 4 if number else None,
    }  # fmt: skip


def _expert(layer: str, expert: int, draw: random.Random) -> dict[str, Any]:
    values = {n: round(draw.random(), 4) for n in ("share", "entropy", "threshold", "hit")}
    return {"layer": layer, "expert": expert, **values}


def _node(layer: str, number: int) -> list[str]:
    call = f"aten.linear.default(some_value_{number}, arg{number}_1, arg{number}_2)"
    rest = [f"linear_{number}", "f32[4, 1024, 1152]", call, layer, f"model.py:{number}"]
    return [layer, "attention", "selected tokens", *rest]
