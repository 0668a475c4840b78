"""The run report: numbers that agree with the statistics, a page that a browser draws offline."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import moeca_compile
from debug.chromium import open_page
from debug.report_examples import LAYERS, STEPS, large_report
from graph_runs import compile_model, only_entry, use_graph_level
from idioms import make, trajectory
from moeca_compile.debug.report import _page


def embedded(path: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())
    assert found is not None
    return json.loads(found[1])


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model after seven steps, six of them recorded, one in between from another sample."""
    use_graph_level(monkeypatch)
    model = make("I1", depth=2, num_experts=4)
    calls = trajectory(model, 7, dx=0.05)
    compiled = compile_model(model, calls[0], policy="moeca", interval=4, tau=0.4)
    with torch.no_grad():
        with moeca_compile.record(compiled):
            for call in calls[:6]:
                compiled(*call)
        compiled(*calls[6])
    return compiled


def test_the_report_agrees_with_what_was_counted(recorded: Any, tmp_path: Path) -> None:
    image = torch.rand(2, 3, 8, 8)
    path = moeca_compile.report(recorded, tmp_path / "run.html", images={"some": image})
    data = embedded(path)
    (entry,) = data["entries"]
    steps = entry["steps"]
    kinds = ["refresh", "reuse", "reuse", "reuse", "refresh", "reuse"]
    assert [s["kind"] for s in steps] == kinds, "the seventh was not recorded"
    assert [s["reason"] for s in steps] == ["new_lane", *3 * ["policy"], "interval", "policy"]
    assert [s["starts"] for s in steps] == [True] + 5 * [False]
    assert data["summary"]["steps"] == 7

    history = only_entry(recorded).history
    assert history is not None
    for number, record in enumerate(history.steps):
        assert record.experts is not None
        computed = record.experts[2]
        per_layer = computed.reshape(2, 4).sum(1) / 64  # 2 samples of 16 tokens, top-2
        assert entry["maps"]["computed"][number] == pytest.approx(per_layer.tolist(), abs=1e-4)
        assert record.experts[3].sum() == 2 * 64
    assert set(entry["maps"]["computed"][1]) != {1.0}, "a reuse step computes less"
    assert entry["maps"]["unmatched"][0] == [None, None]
    assert entry["maps"]["drift"][0] == [None, None]
    assert all(0 < v < 1 for v in entry["maps"]["drift"][4])
    assert len(entry["experts"]) == 8 and all(0 <= e["hit"] <= 1 for e in entry["experts"])
    assert {n[0] for n in entry["graph"]} >= {"blocks.0.moe", "blocks.1.moe"}
    assert {n[1] for n in entry["graph"]} >= {"router", "experts", "attention", "shared expert"}
    assert entry["memory"]["held_bytes"] == moeca_compile.stats(recorded).cache_bytes
    assert len(data["images"]) == 2 and data["images"][0]["src"].startswith("data:image/png")
    assert {p.name for p in tmp_path.glob("*.png")} == {
        f"run.{name}.png" for name in ("computed", "unmatched", "drift")
    }
    page = open_page(path, 1280)
    assert page.console == ()
    assert '<section id="note" hidden="">' in page.dom
    check_a_report_without_steps(recorded, tmp_path / "empty.html")


def check_a_report_without_steps(compiled: Any, path: Path) -> None:
    """Reset forgets the recording; the page then shows how to record."""
    moeca_compile.reset(compiled)
    data = embedded(moeca_compile.report(compiled, path))
    assert data["entries"][0]["steps"] == [] and data["summary"]["steps"] == 0
    assert list(path.parent.glob("empty*.png")) == []
    page = open_page(path, 1280)
    assert page.console == ()
    assert '<section id="note">' in page.dom, "the hint how to record is shown"


def test_an_image_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = torch.compile(make("I1", depth=1), backend="moeca")
    with pytest.raises(ValueError, match=r"'x': expected \[C, H, W\].* got \(4, 4\)"):
        moeca_compile.report(model, tmp_path / "run.html", images={"x": torch.rand(4, 4)})


def test_without_jinja2_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model = torch.compile(make("I1", depth=1), backend="moeca")
    with pytest.raises(moeca_compile.MoecaError, match=r"moeca-compile\[report\]"):
        moeca_compile.report(model, tmp_path / "run.html")


@pytest.mark.parametrize("width", [1280, 390])
def test_a_large_report_is_small_and_drawn_without_a_complaint(tmp_path: Path, width: int) -> None:
    path = tmp_path / "large.html"
    path.write_text(_page(large_report()))
    assert path.stat().st_size < 5 * 2**20
    text = path.read_text()
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", ""), "needs no network"
    assert "https://" not in text and " src=" not in text.split("<script>")[0]
    page = open_page(path, width)
    assert page.console == ()
    assert 'data-drawn="yes"' in page.dom
    assert len(re.findall(r'<rect class="cell"', page.dom)) == 3 * STEPS * LAYERS
    assert len(re.findall(r'<rect class="step"', page.dom)) == STEPS
    assert len(re.findall(r'<rect class="evidence"', page.dom)) == STEPS - 1, "the first has none"


def test_a_steered_run_shows_what_asked_for_its_refreshes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is kept by rows: no map of them, but the forecast's error against its bound."""
    use_graph_level(monkeypatch)
    model = make("I1", depth=1)
    calls = trajectory(model, 9, dx=0.05)
    compiled = compile_model(
        model, calls[0], policy="output_forecast", tolerance=10.0, max_interval=3
    )
    with torch.no_grad(), moeca_compile.record(compiled):
        for call in calls:
            compiled(*call)
    path = moeca_compile.report(compiled, tmp_path / "run.html", plots=False)
    (entry,) = embedded(path)["entries"]
    policy = only_entry(compiled).controller.policy
    shares = [s["evidence"] for s in entry["steps"]]
    first = [s["kind"] == "refresh" for s in entry["steps"]].index(False)
    assert shares[0] is None and all(v is not None and 0 < v < 1 for v in shares[first:])
    assert shares[-1] == pytest.approx(policy.evidence(0), abs=1e-4)
    page = open_page(path, 1280)
    assert page.console == ()
    assert page.dom.count('<rect class="evidence"') == sum(v is not None for v in shares)
    assert 'data-map="computed"' in page.dom and 'data-map="drift"' not in page.dom


def test_a_name_cannot_end_the_script(tmp_path: Path) -> None:
    data = large_report()
    data["entries"][0]["layers"][0] = "</script><b>x"
    assert "</script><b>x" not in _page(data)
