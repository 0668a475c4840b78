"""Compile a reproducer's graph again: what `replay.py` in its folder runs.

replayed = replay(Path("dump/000_graph/reproducer"))
print(replayed.table)                 # regions, as match_regions saw them
replayed.nodes                        # {"refresh": 193, "reuse": 396}: nodes of the lowered graphs
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..lowering.variants import Variants
from ..options import Options
from ..pipeline import Analysis, analyse
from .dump import Dumper
from .graph_json import graph_from_json
from .region_table import region_table


@dataclass(frozen=True)
class Replay:
    """analysis: of the replayed graph; nodes: of the lowered graph of every variant, by name."""

    analysis: Analysis
    nodes: dict[str, int]

    @property
    def table(self) -> str:
        return region_table(self.analysis.regions, self.analysis.plan)


def replay(folder: Path, dumper: Dumper | None = None) -> Replay:
    """Trace, match and lower as the original compile did; no kernel is compiled.

    What went wrong there goes wrong here: the same error is raised. Tensors on a device this
    machine lacks are put on the CPU. Raises FileNotFoundError for a folder that is none.
    """
    described = json.loads((folder / "inputs.json").read_text())
    options = Options.parse(json.loads((folder / "options.json").read_text()))
    saved = torch.load(folder / "values.pt") if (folder / "values.pt").exists() else {}
    values = saved.get("inputs") or [_value(d) for d in described["inputs"]]
    constants = {name: _value(d) for name, d in described["attributes"].items()}
    gm = graph_from_json(
        json.loads((folder / "graph.json").read_text()), saved.get("attributes") or constants
    )
    holes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for hole, each in zip(holes, described["inputs"]):
        hole._dynamo_source = SimpleNamespace(name=each["source"])
    dumper = dumper or Dumper(None)
    analysis = analyse(gm, values, options, dumper)
    variants = Variants(analysis, options, {}, dumper)
    wanted = possible_variants(analysis)
    nodes = {name: len(variants.lowered(name)[0].graph.nodes) for name in wanted}
    return Replay(analysis, nodes)


def possible_variants(analysis: Analysis) -> tuple[str, ...]:
    """Names of the variants that can run for this graph at its options."""
    cached = sorted(analysis.plan.variants)
    return ("plain", "refresh", *cached) if cached else ("plain",)


def _value(described: dict[str, Any]) -> Any:
    if "number" in described:
        return described["number"]
    device = torch.device(described["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        device = torch.device("cpu")
    value: Tensor = torch.empty_strided(
        described["shape"],
        described["stride"],
        dtype=getattr(torch, described["dtype"]),
        device=device,
    ).zero_()
    return torch.nn.Parameter(value, requires_grad=False) if described["parameter"] else value


def main(folder: Path) -> None:
    """Replay `folder` and print what came out."""
    with torch.no_grad():
        found = replay(folder)
    print(found.table)
    for name, count in found.nodes.items():
        print(f"{name}: {count} nodes")
