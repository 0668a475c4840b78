"""A folder that replays one compile without the user's code: script, graph, inputs, options.

    000_graph/reproducer/  replay.py  graph.json  inputs.json  options.json  [values.pt]
    python 000_graph/reproducer/replay.py      -> the table of regions, nodes of each variant

Shapes are enough to compile; values (weights and inputs) are kept only where asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..options import Options
from ..torch_compat import placeholder_source
from .graph_json import NotSerialisable, graph_to_json

SCRIPT = '''"""Replays one compile: python replay.py"""

from pathlib import Path

from moeca_compile.debug.replay import main

main(Path(__file__).parent)
'''

__all__ = ["NotSerialisable", "write_reproducer"]


def write_reproducer(
    folder: Path, gm: GraphModule, values: Sequence[Any], options: Options, weights: bool = False
) -> None:
    """Write `folder`. values: the graph's inputs, real or fake. Raises NotSerialisable."""
    attributes = _attributes(gm)
    graph = graph_to_json(gm)
    holes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    inputs = [_describe(v, placeholder_source(h)) for h, v in zip(holes, values)]
    constants = {name: _describe(value, "") for name, value in attributes.items()}
    settings = {**options.given, "dump_dir": None}
    folder.mkdir()
    (folder / "graph.json").write_text(json.dumps(graph))
    described = {"inputs": inputs, "attributes": constants}
    (folder / "inputs.json").write_text(json.dumps(described, indent=1))
    (folder / "options.json").write_text(json.dumps(settings, indent=1))
    (folder / "replay.py").write_text(SCRIPT)
    real = [v for v in values if isinstance(v, Tensor)]
    if weights and all(type(v) in (Tensor, torch.nn.Parameter) for v in real):
        torch.save({"inputs": list(values), "attributes": attributes}, folder / "values.pt")


def _describe(value: Any, source: str) -> dict[str, Any]:
    if not isinstance(value, Tensor):
        number = value if isinstance(value, (bool, float)) else int(value)
        return {"source": source, "number": number}
    return {
        "source": source,
        "shape": [int(s) for s in value.shape],
        "stride": [int(s) for s in value.stride()],
        "dtype": str(value.dtype).removeprefix("torch."),
        "device": str(value.device),
        "parameter": isinstance(value, torch.nn.Parameter),
    }


def _attributes(gm: GraphModule) -> dict[str, Tensor]:
    """Tensors the graph reads as attributes of its module."""
    found: dict[str, Tensor] = {}
    for node in gm.graph.nodes:
        value = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(value, Tensor):
            found[str(node.target)] = value
        elif node.op == "get_attr" and not isinstance(value, GraphModule):
            raise NotSerialisable(f"node {node.name} reads attribute {node.target} of the model")
    return found
