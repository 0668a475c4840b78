"""`moeca calibrate`: the file it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.commands import SUBJECTS, moeca
from moeca_compile.calibration.policy_file import load


def test_writes_a_policy_file_and_says_what_was_reached(tmp_path: Path) -> None:
    out = tmp_path / "policy.json"
    result = moeca(
        "calibrate", f"{SUBJECTS}:Seeded", "--speedup", "2", "--policy", "fora", "--minutes", "20",
        "--out", str(out), "--json", "-o", "warmup_steps=1",
    )  # fmt: skip
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert data["held_out"]["speedup"] >= 1.9 and data["held_out"]["seed"] == 2
    assert load(out).options == data["options"]
    assert data["options"]["policy"] == "fora"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Seeded",), "one of --speedup and --psnr-db"),
        (("Seeded", "--speedup", "2", "--psnr-db", "40"), "one of --speedup and --psnr-db"),
        (("Seeded", "--speedup", "2", "--seeds", "a"), "expected integers"),
        (("Seeded", "--speedup", "0.5"), "above 1"),
        (("pair", "--speedup", "2"), ".model and .generate()"),
    ],
)
def test_refused(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    subject, *rest = arguments
    out = tmp_path / "policy.json"
    result = moeca("calibrate", f"{SUBJECTS}:{subject}", *rest, "--out", str(out))
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split()) and not out.exists()
