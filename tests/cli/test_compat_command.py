"""`moeca compat`: rows of given models, of a suite, and what it says where there is none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cli.commands import SUBJECTS, moeca

CASES = """
from idioms import make, trajectory
from moeca_compile.debug.compat_suite import Absent


class Case:
    idiom, source, version, regions, options = "I8", "here", "1.2", 2, {}

    def __init__(self, name):
        self.name = name

    def built(self):
        if self.name == "missing":
            raise Absent("library is not installed")
        if self.name == "broken":
            raise UnboundLocalError("flag")
        model = make("I8", depth=1, num_experts=4)
        return model, [dict(zip("xty", call)) for call in trajectory(model, 4, dx=0.05)]


CASES = [Case("broken"), Case("there"), Case("missing")]
"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "made_up_suite"
    (folder / "cases").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "cases" / "__init__.py").write_text(CASES)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder


def test_a_suite_has_a_row_a_case(suite: Path) -> None:
    result = moeca("compat", "--suite", str(suite), "--json")
    assert result.exit_code == 1  # one of them does not start
    broken, there, missing = json.loads(result.stdout)
    assert broken["reason"] == "building it: UnboundLocalError: flag" and not broken["good"]
    assert there["good"] and there["version"] == "here 1.2"
    assert (there["graphs_plain"], there["graphs_moeca"], there["reuse_steps"]) == (1, 1, 3)
    assert (there["regions_matched"], there["regions_present"]) == (2, 2)
    assert missing["reason"] == "library is not installed" and missing["graphs_moeca"] is None
    text = moeca("compat", "--suite", str(suite), "--only", "missing", "--markdown").stdout
    assert text.startswith("| model") and "library is not installed" in text


def test_a_given_model_and_its_exit_code() -> None:
    result = moeca("compat", f"{SUBJECTS}:dense", "--markdown")  # a long path is not wrapped
    assert result.exit_code == 1
    assert "py:dense" in result.stdout and "0/0" in result.stdout
    assert "idiom" not in result.stdout  # nobody said which one it is


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "nowhere"), "no suite in nowhere: expected nowhere/cases/__init__.py"),
        (("--suite", "nowhere", f"{SUBJECTS}:pair"), "give models or --suite, not both"),
    ],
)
def test_wrong_usage_says_why(arguments: tuple[str, ...], message: str) -> None:
    result = moeca("compat", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr and not result.stdout


def test_a_word_that_no_case_has(suite: Path) -> None:
    result = moeca("compat", "--suite", str(suite), "--only", "nobody")
    assert result.exit_code == 2 and "nobody" in result.stderr
