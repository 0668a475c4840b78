"""Dumps: a numbered file per stage and variant and a table of them; nothing at all when off."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from graph_runs import compile_model, use_graph_level, watched_call
from idioms import make, trajectory
from moeca_compile.debug.dump import Dumper
from moeca_compile.pipeline import PASSES

BEFORE = ["dynamo", "aten", *(each.name for each in PASSES), "match_regions"]
REFRESH = ["refresh.dialect", "refresh.lowered"]
REUSE = ["reuse.dialect", "reuse.lowered"]
PLAIN = ["plain.dialect", "plain.lowered"]


def numbered(stages: list[str]) -> list[str]:
    return [f"{number:02d}_{stage}.txt" for number, stage in enumerate(stages)]


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("[0-9][0-9]_*.txt"))


def summary_stages(folder: Path) -> list[str]:
    lines = (folder / "summary.txt").read_text().splitlines()
    assert lines[0].split() == ["stage", "nodes", "ms", "note"]
    return [line.split()[0] for line in lines[2:]]


def test_every_stage_and_variant_is_dumped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_graph_level(monkeypatch)
    target = tmp_path / "new" / "dumps"
    model = make("I1", depth=1, num_experts=4)
    calls = trajectory(model, 2, dx=0.05)
    compiled = compile_model(model, calls[0], policy="moeca", dump_dir=str(target))
    watched_call(compiled, *calls[0])
    (folder,) = target.iterdir()
    assert folder.name == "000_graph"
    assert files(folder) == numbered(BEFORE + REFRESH), "variants are made when first needed"
    watched_call(compiled, *calls[1])
    assert files(folder) == numbered(BEFORE + REFRESH + REUSE)
    graphs = [stage for stage in BEFORE + REFRESH + REUSE if stage != "match_regions"]
    assert summary_stages(folder) == graphs

    assert {p.name for p in folder.iterdir() if not p.suffix} == {"layers", "reproducer"}
    (drawing,) = (folder / "layers").glob("*.dot")
    assert drawing.name == "00_blocks.0.moe.dot"
    lines = drawing.read_text().splitlines()
    assert lines[0] == "digraph {" and lines[-1] == "}"
    assert any(line.startswith('"routed_experts" [label=') for line in lines)
    assert any(line.endswith('-> "routed_experts"') for line in lines)
    assert drawing.with_suffix(".svg").exists() == bool(shutil.which("dot"))
    assert {p.stem for p in folder.glob("*.diff")} == {
        f"{number:02d}_{stage}"
        for number, stage in enumerate(BEFORE + REFRESH + REUSE)
        if stage not in ("dynamo", "match_regions")
    }
    text = {path.name[3:-4]: path.read_text() for path in folder.glob("*.txt")}
    assert "moeca.select_experts" in text["aten"]
    assert "blocks.0.moe" in text["match_regions"]
    assert "8 experts" not in text["match_regions"]
    assert "4 experts, top-2, 1 shared" in text["match_regions"]
    assert "bytes per lane" in text["match_regions"]
    assert "moeca.cache_fill" in text["refresh.dialect"]
    assert "moeca.guard_branches" in text["reuse.dialect"]
    assert "moeca.cache_" not in text["reuse.lowered"]
    assert "index_copy_" in text["reuse.lowered"]
    assert "f32[" in text["reuse.lowered"], "nodes are shown with dtype and shape"


def test_another_graph_gets_the_next_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_graph_level(monkeypatch)
    monkeypatch.setenv("MOECA_DUMP_DIR", str(tmp_path))
    for number in range(2):
        model = make("I8", depth=1, num_experts=4)
        call = trajectory(model, 1)[0]
        watched_call(compile_model(model, call, interval=1), *call)
        folder = tmp_path / f"{number:03d}_graph"
        assert files(folder) == numbered(BEFORE + PLAIN)
        torch._dynamo.reset()


def test_nothing_is_written_when_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MOECA_DUMP_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    use_graph_level(monkeypatch)
    model = make("I8", depth=1, num_experts=4)
    call = trajectory(model, 1)[0]
    watched_call(compile_model(model, call), *call)
    assert list(tmp_path.iterdir()) == []
    Dumper(None).text("stage", "text")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("")
    with pytest.raises(OSError, match="file"):
        Dumper.below(occupied, "graph")
