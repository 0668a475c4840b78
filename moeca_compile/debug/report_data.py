"""Everything the run report shows, as plain numbers and words; the page only draws.

report_data(entries, stats)  ->  {"summary": {..}, "entries": [{"steps": [..], "maps": {..}}, ..]}

The only place of the report that waits for a device: recorded tensors are read here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from ..graph.region import module_path, source_line
from ..runtime.entry import CompiledEntry
from ..runtime.history import EXPERT_FIELDS, History, StepRecord, counted
from ..runtime.stats import Stats
from .graph_text import node_code
from .marks import region_marks

MAPS = ("computed", "unmatched", "drift")
FULL = ("plain", "refresh")  # of the others, those without counts compute nothing in a layer
OUTSIDE = "outside the layers"
# What a reuse step evaluates a node on, by its role.
ROWS = {
    "attention": "selected tokens",
    "key_value": "selected tokens",
    "shared expert": "selected tokens",
    "experts": "selected branches",
}


def report_data(entries: Sequence[CompiledEntry], stats: Stats) -> dict[str, Any]:
    """Plain data of one compiled model. entries: one per set of input shapes."""
    return {
        "summary": _summary(stats),
        "layers": [_layer_totals(layer) for layer in stats.to_dict()["layers"]],
        "options": entries[0].options.to_dict() if entries else {},
        "entries": [_entry(entry) for entry in entries],
    }


def _summary(stats: Stats) -> dict[str, Any]:
    return {
        "steps": stats.steps,
        "refresh": stats.refresh_steps,
        "reuse": stats.reuse_steps,
        "forecast": stats.forecast_steps,
        "skip": stats.skip_steps,
        "plain": stats.plain_steps,
        "generations": stats.generations,
        "lanes": stats.lanes,
        "branches": _share(stats.branches_computed, stats.branches_total),
        "tokens": _share(stats.tokens_attended, stats.tokens_total),
        "speedup_flops": round(stats.speedup_flops, 3),
        "cache_bytes": stats.cache_bytes,
        "dropped": stats.dropped,
        "unmatched": stats.unmatched,
        "reasons": dict(stats.reasons.most_common()),
        "events": list(stats.events),
    }


def _layer_totals(layer: dict[str, Any]) -> dict[str, Any]:
    computed = layer["flops_computed"]
    return {
        "name": layer["name"],
        "branches": _share(layer["branches_computed"], layer["branches_total"]),
        "tokens": _share(layer["tokens_attended"], layer["tokens_total"]),
        "unmatched": layer["unmatched"],
        "dropped": layer["dropped"],
        "speedup": round(layer["flops_full"] / computed, 2) if computed else None,
    }


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


def _entry(entry: CompiledEntry) -> dict[str, Any]:
    plan = entry.variants.analysis.plan
    history = entry.history or History(plan, entry.options)
    names = [layer.region.name for layer in plan.layers]
    steps = list(history.steps)
    return {
        "name": _name(entry),
        "layers": names,
        "steps": [_step(record, number) for number, record in enumerate(steps)],
        "forgotten": history.forgotten,
        "maps": _maps(steps, history),
        "experts": _experts(steps, history),
        "memory": {
            "kinds": plan.layout.nbytes_by_kind(),
            "lane_bytes": entry.cache_bytes,
            "held_bytes": entry.store.nbytes,
            "lanes": len(entry.store.lanes),
        },
        "compile_seconds": {k: round(v, 2) for k, v in entry.variants.compile_seconds.items()},
        "graph": _graph(entry),
    }


def _name(entry: CompiledEntry) -> str:
    """The shape of the sample, by which a user tells entries apart."""
    holes, sample = entry.variants.analysis.aten.placeholders, entry.roles.sample
    if sample is None:
        return "input shapes unknown"
    return "x".join(str(int(size)) for size in holes[sample].meta["val"].shape)


def _step(record: StepRecord, number: int) -> dict[str, Any]:
    place = record.place
    return {
        "number": number,
        "kind": record.decision.kind,
        "reason": record.decision.reason,
        "lane": None if place is None else place.lane,
        "generation": None if place is None else place.generation,
        "step": None if place is None else place.step,
        "timestep": None if place is None or place.timestep is None else round(place.timestep, 5),
        "starts": place is not None and place.new_generation,
        "evidence": None if record.evidence is None else _number(record.evidence),
    }


def _maps(steps: Sequence[StepRecord], history: History) -> dict[str, list[list[float | None]]]:
    """Per map a list per step of a value per layer; None where a step has no such value."""
    found: dict[str, list[list[float | None]]] = {name: [] for name in MAPS}
    for record in steps:
        counts = counted(record)
        drift = [] if record.drift is None else record.drift.tolist()
        full = 1.0 if record.decision.kind in FULL else 0.0
        computed, unmatched = [], []
        for number, layer in enumerate(history.layers):
            line = counts[number] if counts else None
            whole = line["branches"] if line and layer.region.open_ended else layer.branches
            computed.append(_share(line["branches_computed"], whole) if line else full)
            unmatched.append(_share(line["unmatched"], whole) if line else None)
        found["computed"].append(computed)
        found["unmatched"].append(unmatched)
        found["drift"].append([_number(d) for d in drift] or [None] * len(history.layers))
    return found


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _experts(steps: Sequence[StepRecord], history: History) -> list[dict[str, Any]]:
    """One line per layer and expert; hit rate: share of its branches on reuse steps read."""
    tables = [r.experts.double().cpu() for r in steps if r.experts is not None]
    reused = [
        r.experts.double().cpu()
        for r in steps
        if r.experts is not None and r.decision.kind == "reuse"
    ]
    if not tables:
        return []
    mean = torch.stack(tables).mean(0)
    sums = torch.stack(reused).sum(0) if reused else torch.zeros_like(mean)
    values = dict(zip(EXPERT_FIELDS, mean.tolist()))
    ran, seen = (sums[EXPERT_FIELDS.index(f)].tolist() for f in ("computed", "branches"))
    lines, column = [], 0
    for layer in history.layers:
        count = layer.region.num_experts
        whole = sum(values["branches"][column : column + count])
        for expert in range(count):
            at = column + expert
            lines.append(
                {
                    "layer": layer.region.name,
                    "expert": expert,
                    "share": _share(values["branches"][at], whole),
                    "entropy": _number(values["entropy"][at]),
                    "threshold": _number(values["threshold"][at]),
                    "hit": _share(seen[at] - ran[at], seen[at]),
                }
            )
        column += count
    return lines


def _graph(entry: CompiledEntry) -> list[list[str]]:
    """[layer, role, rows, node, type, call, module, source] of every node that does something."""
    analysis = entry.variants.analysis
    marks = region_marks(analysis.regions)
    lines = []
    for node in analysis.aten.gm.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        mark = marks.get(node)
        layer, role = (mark.layer, mark.role) if mark else (OUTSIDE, "")
        lines.append([layer, role, ROWS.get(role, "all rows"), *_described(node)])
    return lines


def _described(node: Node) -> list[str]:
    head, _, call = node_code(node).partition(" = ")
    name, _, shown = head.partition(": ")
    module = module_path(node) if node.meta.get("nn_module_stack") else ""
    place = source_line(node).rsplit("/", 1)[-1]
    return [name, shown.strip('"'), call.removeprefix("torch.ops."), module, place]
