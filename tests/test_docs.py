"""README.md against the package: snippets run, the options table is complete, files exist."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moeca_compile
from graph_runs import use_graph_level
from idioms import inputs, make

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PASSES = (ROOT / "moeca_compile" / "passes" / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def sampler(model: Any, labels: Tensor, steps: int = 12) -> Tensor:
    """A sampling loop as a user has it, in small steps: labels [B] -> images [B, C, H, W]."""
    x = torch.randn(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for index in range(steps):
            t = torch.full((len(labels),), 0.9 - 0.02 * index)
            x = x - 0.01 * model(x, t, labels)
    return x


def namespace() -> dict[str, Any]:
    """What the README takes for granted: a model, one call's arguments, a sampler."""
    model = make("split", depth=1, num_experts=4)
    x, t, y = inputs(model)
    names = {"model": model, "x": x, "t": t, "y": y, "labels": y, "sampler": sampler}
    return {**names, "torch": torch, "moeca_compile": moeca_compile}


def test_snippets_are_found() -> None:
    assert len(SNIPPETS) >= 6
    assert README.count("```python") == len(SNIPPETS)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs_and_caches(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    number: int,
) -> None:
    use_graph_level(monkeypatch)
    monkeypatch.chdir(tmp_path)  # a snippet writes its report where it stands
    names = namespace()
    exec(compile(SNIPPETS[number], f"README.md snippet {number}", "exec"), names)
    printed = capsys.readouterr().out
    if "compiled" in names and "reset(" not in SNIPPETS[number]:
        stats = moeca_compile.stats(names["compiled"])
        assert stats.steps > 0 and stats.plain_steps == 0
        cached = stats.steps - stats.refresh_steps  # skipped, or of reused rows
        assert cached > 0 or "fullgraph" in SNIPPETS[number]
    assert "print(" not in SNIPPETS[number] or "blocks.0.moe" in printed


def _options_table() -> dict[str, str]:
    section = README.split("\n## Options\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \| .+ \|$", section, re.MULTILINE))


def test_every_option_is_in_the_table_with_its_default() -> None:
    fields = {f.name: f.default for f in dataclasses.fields(moeca_compile.Options)}
    table = {name: ast.literal_eval(default) for name, default in _options_table().items()}
    assert table == fields


def test_every_public_name_is_mentioned() -> None:
    missing = [n for n in moeca_compile.__all__ if n not in README and n != "MoecaError"]
    assert missing == []


@pytest.mark.parametrize("text", [README, PASSES], ids=["README", "passes"])
def test_every_file_named_exists(text: str) -> None:
    named = set(re.findall(r"`((?:tests|examples|benchmarks|moeca_compile)/[\w./-]+)`", text))
    assert any(name.startswith("tests/") for name in named)
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_files_of_the_diagram_exist() -> None:
    diagram = README.split("\n## How it works\n")[1].split("```")[1]
    named = re.findall(r"\b((?:capture|graph|passes|lowering|runtime)/[\w.*]*)", diagram)
    assert len(named) >= 6
    assert [n for n in named if not list((ROOT / "moeca_compile").glob(n or "-"))] == []


def test_passes_readme_names_every_cached_tensor() -> None:
    source = (ROOT / "moeca_compile" / "passes" / "cache_plan.py").read_text()
    fields = set(re.findall(r'(?:spec|cache|field)\(f?"(\w+)', source))
    fields |= {"token_in", "shared_in"}
    assert {"slot_out", "slot_drift", "attention", "shared"} <= fields
    assert [f for f in sorted(fields) if f"`{f}" not in PASSES] == []
