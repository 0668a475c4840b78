"""A reproducer compiles to the same graphs without the model; what it cannot hold is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from idioms import inputs, make
from moeca_compile.debug.dump import Dumper
from moeca_compile.debug.explain import Analyser, explain_with
from moeca_compile.debug.graph_json import NotSerialisable, graph_from_json, graph_to_json
from moeca_compile.debug.replay import replay
from moeca_compile.options import Options


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump, with values, of a model that exists nowhere else."""
    root = tmp_path_factory.mktemp("dump")
    model = make("I8", depth=1, num_experts=4)
    analyser = Analyser(
        Options(policy="moeca", budget=0.25, timestep="t"),
        lambda: Dumper.below(root, "graph", weights=True),
    )
    explain_with(analyser, model, inputs(model), {})
    torch._dynamo.reset()
    return root / "000_graph"


def test_the_replay_sees_the_same_graphs(folder: Path, tmp_path: Path) -> None:
    dumper = Dumper.below(tmp_path, "replayed")
    found = replay(folder / "reproducer", dumper)
    assert [m.name for m in found.analysis.regions.moe] == ["blocks.0.moe.experts"]
    assert found.nodes.keys() >= {"refresh", "reuse"}
    assert dumper.folder is not None
    for stage in ("aten", "match_regions"):
        (first,), (again,) = (list(f.glob(f"*_{stage}.txt")) for f in (folder, dumper.folder))
        assert again.read_text() == first.read_text(), stage
    assert "L['t']" in [i.source for i in found.analysis.aten.inputs]
    holds = (folder / "reproducer" / "options.json").read_text()
    assert '"budget": 0.25' in holds and '"timestep": "t"' in holds


def test_values_are_kept_when_asked_for(folder: Path) -> None:
    saved = torch.load(folder / "reproducer" / "values.pt")
    assert any(isinstance(v, Tensor) and v.abs().sum() > 0 for v in saved["inputs"])


@pytest.mark.slow
def test_the_script_needs_nothing_else(folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(folder / "reproducer" / "replay.py")],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "blocks.0.moe" in done.stdout and "reuse:" in done.stdout


def some_function(x: Tensor) -> Tensor:
    return x


def _calls(function: object) -> GraphModule:
    gm = symbolic_trace(nn.Identity())
    hole = next(iter(gm.graph.nodes))
    with gm.graph.inserting_after(hole):
        gm.graph.call_function(function, (hole,))  # type: ignore[arg-type]
    return gm


def test_a_function_of_the_user_is_refused_by_name() -> None:
    with pytest.raises(NotSerialisable, match="some_function.* not torch's"):
        graph_to_json(_calls(some_function))


@pytest.mark.parametrize(
    "function",
    [torch.topk, torch.nn.functional.silu, torch._C._nn.linear, torch.ops.moeca.cache_read.default],
)
def test_targets_come_back(function: object) -> None:
    gm = _calls(function)
    again = graph_from_json(graph_to_json(gm), {})
    assert [n.target for n in again.graph.nodes] == [n.target for n in gm.graph.nodes]
