"""Stages in torch's own logs and traces, and nothing made where nobody listens."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from moeca_compile.debug import dump
from moeca_compile.debug.dump import Dumper

SCRIPT = """
import torch, moeca_compile
with torch.no_grad():
    torch.compile(torch.nn.Linear(4, 4).eval(), backend="moeca")(torch.randn(2, 4))
"""


@pytest.mark.compile
def test_torch_logs_and_torch_trace_show_the_stages(tmp_path: Path) -> None:
    variables = {"TORCH_LOGS": "+moeca_compile", "TORCH_TRACE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **variables}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "dynamo: " in done.stderr and "match_regions: 0 matched" in done.stderr
    trace = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "moeca_aten" in trace and "moeca_match_regions" in trace
    assert "torch.ops.aten.linear.default" in trace


def test_no_text_is_made_when_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(dump, "graph_text", lambda *args: made.append(args) or "")
    trace = logging.getLogger("torch.__trace")
    monkeypatch.setattr(trace, "handlers", [])
    monkeypatch.setattr(trace, "propagate", False)
    monkeypatch.setattr(trace, "disabled", True)
    gm = torch.fx.symbolic_trace(nn.Linear(2, 2))
    Dumper(None).graph("aten", gm)
    assert made == []
