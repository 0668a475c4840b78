"""docs/calibration.md: its snippets run, one after the other, in a user's folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moeca_compile
import moeca_compile.calibration.search_space as space_module
from calibration.sampling import denoiser
from calibration.sampling import generate as sample
from graph_runs import use_graph_level

DOC = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", DOC, re.DOTALL | re.MULTILINE)


def test_snippets_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use_graph_level(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(space_module, "SPACE", {"fora": space_module.SPACE["fora"]})

    def sampler(model: Any, labels: Tensor, seed: int) -> Tensor:
        return sample(model, seed)

    names: dict[str, Any] = {"model": denoiser(), "sampler": sampler, "labels": torch.arange(2)}
    names |= {"torch": torch, "moeca_compile": moeca_compile}
    assert len(SNIPPETS) == DOC.count("```python") == 2
    for number, snippet in enumerate(SNIPPETS):
        exec(compile(snippet, f"calibration.md snippet {number}", "exec"), names)
    assert names["found"].reached and (tmp_path / "policy.json").exists()
    assert moeca_compile.stats(names["compiled"]).speedup_flops >= 3 * 0.95
    assert "held-out seed 2" in capsys.readouterr().out


def test_every_file_named_exists() -> None:
    named = re.findall(r"`((?:moeca_compile|docs)/[\w./]+)`", DOC)
    assert named
    assert [n for n in named if not (Path(__file__).parents[2] / n).exists()] == []
