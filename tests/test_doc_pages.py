"""The pages in docs/: snippets run, commands print what is shown, tables match the package."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import torch

import moeca_compile
from cli.commands import moeca
from graph_runs import use_graph_level
from idioms import inputs, make
from idioms.dispatch import DISPATCHES
from test_docs import namespace

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = (
    "concepts.md",
    "options.md",
    "debugging.md",
    "adding-a-pass.md",
    "families.md",
    "speed-benchmark.md",
)
TEXT = {name: (DOCS / name).read_text() for name in PAGES}


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", [n for n in PAGES if blocks("python", TEXT[n])])
def test_snippets_of_a_page_run_one_after_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    use_graph_level(monkeypatch)
    monkeypatch.chdir(tmp_path)
    names = namespace()
    for number, snippet in enumerate(blocks("python", TEXT[name])):
        exec(compile(snippet, f"{name} snippet {number}", "exec"), names)
    if name == "debugging.md":
        assert (tmp_path / "run.html").stat().st_size > 10_000


def commands() -> list[object]:
    """(command line, lines shown below it) of every console block."""
    found = []
    for block in (b for text in TEXT.values() for b in blocks("console", text)):
        head, *shown = block.splitlines()
        line = head.removeprefix("$ ")
        found.append(pytest.param(line, shown, id=line))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("line", "shown"), commands())
def test_a_command_prints_what_the_page_shows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, shown: list[str]
) -> None:
    """Numbers may differ by rounding between machines; words, options and counts of 0 not."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    name, *arguments = shlex.split(line)
    assert name == "moeca"
    result = moeca(*arguments)
    parted = "first above" in result.stdout
    assert result.exit_code == int(parted), result.stderr
    printed = _plain(result.stdout)
    for each in shown:
        assert each == "..." or _plain(each) in printed, each


def _plain(text: str) -> str:
    text = re.sub(r"\s+", " ", text)
    return re.sub(r"\b(?!0 of)\d+(\.\d+)?\b", "#", text).strip()


def test_the_walk_through_names_its_mistake() -> None:
    """The page shows the option at fault, and the file it is in still has it."""
    assert "option tau is 8, lower it" in TEXT["debugging.md"]
    assert '"tau": 8.0' in (ROOT / "examples" / "bad_threshold.py").read_text()


def test_every_option_is_in_a_table_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| .+ \| .+ \|$", TEXT["options.md"], re.MULTILINE)
    defaults = {f.name: f.default for f in dataclasses.fields(moeca_compile.Options)}
    assert {name: ast.literal_eval(value) for name, value in rows} == defaults
    assert len(rows) == len(defaults), "none twice"


def dispatch_table() -> dict[str, bool]:
    rows = re.findall(r"^\| (\w+) \| .+ \| .+ \| (yes|no) \|$", TEXT["families.md"], re.MULTILINE)
    return {name: answer == "yes" for name, answer in rows}


def test_every_dispatch_is_in_the_table() -> None:
    assert dispatch_table().keys() == DISPATCHES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("idiom", DISPATCHES)
def test_the_table_of_families_is_what_explain_says(idiom: str) -> None:
    model = make(idiom, depth=1, num_experts=4)
    call = inputs(model)
    if idiom in ("I9", "I6_grouped"):  # grouped products are traced in bfloat16 only
        model, call = model.to(torch.bfloat16), (call[0].bfloat16(), *call[1:])
    report = moeca_compile.explain(model, *call)
    assert report.matched == dispatch_table()[idiom]
    assert report.matched or all(r.reason for r in report.regions if r.kind == "moe")


@pytest.mark.parametrize("name", PAGES)
def test_files_named_on_a_page_exist(name: str) -> None:
    named = re.findall(r"`((?:tests|examples|moeca_compile|docs)/[\w./-]+)`", TEXT[name])
    assert [n for n in named if not (ROOT / n).exists()] == []
