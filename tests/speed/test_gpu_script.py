"""benchmarks/gpu.sh: a clear word without a GPU, and a dry run that goes through all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(
        [str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    result = run()
    assert result.returncode == 2
    assert "no CUDA device" in result.stderr and "--device cpu --model tiny" in result.stderr
    assert not result.stdout


@pytest.mark.slow
def test_dry_run_on_the_cpu(tmp_path: Path) -> None:
    sizes = ("--model", "tiny", "--batch", "2", "--steps", "6", "--rounds", "1")
    result = run("--device", "cpu", "--engine", "graph", *sizes, "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.iterdir()
    told = json.loads(path.read_text())
    rows = {row["candidate"]: row for row in told["rows"]}
    assert set(rows) == {
        "eager", "Inductor, as shipped", "one graph", "moeca, 10 %", "auto"
    }  # fmt: skip
    assert all(row["checks"] == "ok" for row in rows.values())
    ours = rows["moeca, 10 %"]
    assert ours["cached step"] > 0 and ours["/ FLOPs"] > 1.5 and ours["cache MiB"] > 0
    assert ours["off eager"] <= 4e-2
    assert "moeca, 10 %" in result.stdout
