"""The command line: exit codes, JSON on stdout, and a line that names the missing extra."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import moeca_compile.__main__ as main_module
from cli.commands import SUBJECTS, moeca
from graph_runs import use_graph_level
from moeca_compile.cli import COMMANDS


def test_every_command_has_help() -> None:
    listed = moeca("--help").stdout
    for name in COMMANDS:
        assert name in listed
        assert moeca(name, "--help").exit_code == 0


def test_env_knows_versions() -> None:
    found = json.loads(moeca("env", "--json").stdout)
    assert found["packages"]["torch"] and found["moeca_compile"]
    assert "moeca_compile" in moeca("env").stdout


def test_explain_and_its_exit_codes() -> None:
    well = moeca("explain", f"{SUBJECTS}:pair", "--json", "-o", "budget=0.5", "-o", "policy=moeca")
    assert well.exit_code == 0
    data = json.loads(well.stdout)
    assert [r["matched"] for r in data["regions"]] == [True, True]
    assert data["prediction"]["flops_cached_min"] < data["prediction"]["flops_full"]
    nothing = moeca("explain", f"{SUBJECTS}:dense", "--markdown")
    assert nothing.exit_code == 1
    assert "No regions." in nothing.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explian",), "did you mean 'explain'"),
        (("explain",), "Missing argument 'MODEL'"),
        (("explain", f"{SUBJECTS}:pair", "-o", "intervall=3"), "did you mean 'interval'"),
        (("explain", f"{SUBJECTS}:pair", "-o", "interval"), "expected name=value"),
    ],
)
def test_wrong_usage_is_two_and_says_why(arguments: tuple[str, ...], message: str) -> None:
    result = moeca(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and not result.stdout


def test_dump_lists_what_it_wrote(tmp_path: Path) -> None:
    result = moeca("dump", f"{SUBJECTS}:pair", "--out", str(tmp_path), "--json")
    assert result.exit_code == 0
    files = [Path(f) for f in json.loads(result.stdout)["files"]]
    assert all(f.exists() for f in files)
    names = {f.name for f in files}
    assert {"summary.txt", "replay.py", "01_aten.diff"} <= names
    assert any(n.endswith("refresh.lowered.txt") for n in names)


def test_report_samples_once_and_writes_the_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_graph_level(monkeypatch)
    page = tmp_path / "run.html"
    result = moeca("report", f"{SUBJECTS}:Sampler", "--out", str(page), "--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert (data["stats"]["refresh_steps"], data["stats"]["reuse_steps"]) == (2, 4)
    assert sorted(Path(p).name for p in data["plots"]) == [
        "run.computed.png", "run.drift.png", "run.unmatched.png"
    ]  # fmt: skip
    assert page.read_text().count("<!doctype html>") == 1
    needs_a_sampler = moeca("report", f"{SUBJECTS}:pair", "--out", str(page))
    assert needs_a_sampler.exit_code == 2
    assert "an object with .model and .generate()" in needs_a_sampler.stderr


def test_without_click_one_line_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = main_module.importlib.util.find_spec
    monkeypatch.setattr(
        main_module.importlib.util, "find_spec", lambda n: None if n == "click" else found(n)
    )
    monkeypatch.setattr(sys, "argv", ["moeca", "env"])
    with pytest.raises(SystemExit) as caught:
        main_module.main()
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and 'pip install "moeca-compile[cli]"' in message
