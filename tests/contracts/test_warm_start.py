"""A second process compiles nothing anew: both of Inductor's caches hit for every variant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
GENERATION = """
import json
import torch
from torch._dynamo.utils import counters
from graph_runs import compile_model
from idioms import make, trajectory

model = make("split", attention="sdpa", dim=32, depth=1, tokens=16, expert="swiglu")
calls = trajectory(model, 2, dx=0.05)[:3]
compiled = compile_model(model, calls[0], interval=4, budget=0.25, order="attention_first")
with torch.no_grad():
    for call in calls:
        compiled(*call)
print(json.dumps({part: dict(counters[part]) for part in ("inductor", "aot_autograd")}))
"""


def run_generation(cache: Path) -> dict[str, dict[str, int]]:
    """Counters of a process that runs a refresh and two reuse steps."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
    }
    done = subprocess.run(
        [sys.executable, "-c", GENERATION],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=1200,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.compile
def test_the_caches_hit_in_the_next_process(tmp_path: Path) -> None:
    cold, warm = run_generation(tmp_path), run_generation(tmp_path)
    assert cold["inductor"]["fxgraph_cache_miss"] >= 2  # refresh and reuse
    assert warm["inductor"].get("fxgraph_cache_miss", 0) == 0
    assert warm["inductor"].get("fxgraph_cache_bypass", 0) == 0
    assert warm["aot_autograd"].get("autograd_cache_miss", 0) == 0
    assert warm["aot_autograd"].get("autograd_cache_bypass", 0) == 0
    assert warm["aot_autograd"]["autograd_cache_hit"] >= 2
