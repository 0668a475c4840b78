"""Rows on disk: what a cut-off run leaves is found again, and nothing else is taken for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from moeca_compile.bench import store as store_module
from moeca_compile.bench.store import RowStore, row_key
from moeca_compile.bench.subject import weights_digest


def test_rows_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    RowStore(path, resume=True).append({"key": "a", "mse": 0.1 + 0.2})
    again = RowStore(path, resume=True)
    assert again.find("a") == {"key": "a", "mse": 0.1 + 0.2}
    assert again.find("b") is None


def test_failed_rows_are_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    RowStore(path, resume=True).append({"key": "a", "error": "RuntimeError"})
    store = RowStore(path, resume=True)
    assert store.find("a") is None
    store.append({"key": "a", "error": None})
    assert RowStore(path, resume=True).find("a") is not None


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"key": "a"}\n{"key": "b", "ms')
    store = RowStore(path, resume=True)
    assert store.find("a") and store.find("b") is None
    store.append({"key": "c"})
    assert RowStore(path, resume=True).find("c")


def test_without_resume_the_old_rows_are_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    RowStore(path, resume=False).append({"key": "a"})
    assert RowStore(path, resume=False).find("a") is None
    assert '"a"' in (tmp_path / "rows.jsonl.previous").read_text()


def test_a_key_is_of_everything_a_figure_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    key = row_key(candidate="c", seed=0)
    assert key == row_key(seed=0, candidate="c")
    assert key != row_key(candidate="c", seed=1)
    monkeypatch.setattr(store_module.torch, "__version__", "0.0")
    assert key != row_key(candidate="c", seed=0)


def test_rows_of_other_sources_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    store = RowStore(path, resume=True)
    store.append({"key": "a", "sources": store_module.sources_digest()})
    store.append({"key": "b", "sources": "another"})
    assert RowStore(path, resume=True).stale == 1


def test_weights_digest_sees_a_single_value() -> None:
    model = nn.Linear(2, 2)
    before = weights_digest(model)
    assert before == weights_digest(model)
    model.weight.data[0, 0] += 1e-6 + model.weight.data[0, 0].abs() * 1e-6
    assert weights_digest(model) != before
