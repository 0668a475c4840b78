"""In which form experts run on their rows. That every form computes the same is for contracts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graph_runs import compile_model, only_entry, use_graph_level
from idioms import make, trajectory
from moeca_compile.lowering.variants import Variants, host_reads
from moeca_compile.passes import run_experts

BY_EXPERT = torch.ops.moeca.grouped_experts.default
BY_PRODUCT = torch.ops.moeca.grouped_linear.default
BATCHED = torch.ops.aten.bmm.default
ALL_ROWS = 2 * 16 * 2  # samples, tokens, top-2
HIDDEN = 48  # of every expert


@pytest.fixture(autouse=True)
def graph_level(monkeypatch: pytest.MonkeyPatch) -> None:
    use_graph_level(monkeypatch)


def variants(idiom: str, dtype: torch.dtype = torch.float32, **options: Any) -> Variants:
    """Of a model that has run once."""
    model = make(idiom, depth=1, expert="swiglu", attention="sdpa").to(dtype)
    x, t, y = trajectory(model, 1, dx=0.05)[0]
    call = (x.to(dtype), t.to(dtype), y)
    run = compile_model(model, call, policy="moeca", interval=4, **options)
    with torch.no_grad():
        run(*call)
    return only_entry(run).variants


def forms(variants: Variants, variant: str) -> set[Any]:
    graph, _ = variants.dialect(variant)
    return {n.target for n in graph.graph.nodes} & {BY_EXPERT, BY_PRODUCT, BATCHED}


@pytest.mark.parametrize(
    ("rows", "budget", "refresh", "reuse"),
    [
        (ALL_ROWS, 0.25, BY_PRODUCT, BY_PRODUCT),
        (ALL_ROWS - 1, 0.25, BY_EXPERT, BY_PRODUCT),
        (ALL_ROWS - 1, None, BY_EXPERT, BY_EXPERT),  # as many rows as the data says
        (ALL_ROWS / 4 - 1, 0.25, BY_EXPERT, BY_EXPERT),
    ],
)
def test_one_after_another_where_the_hidden_rows_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
    rows: float,
    budget: float | None,
    refresh: Any,
    reuse: Any,
) -> None:
    monkeypatch.setattr(run_experts, "STAYS_IN_CACHE", rows * HIDDEN * 4)
    monkeypatch.setattr(run_experts, "WITH_KERNEL", {})
    found = variants("I1", budget=budget)
    assert forms(found, "plain") == forms(found, "refresh") == {refresh}
    assert forms(found, "reuse") == {reuse}


def test_equal_numbers_of_rows_are_one_batched_product() -> None:
    """Stacked weights of experts that pick: nothing is read on the host, whatever the device. In a
    reuse step their numbers differ."""
    found = variants("I6_grouped", torch.bfloat16, budget=0.25, order="attention_first")
    assert forms(found, "plain") == forms(found, "refresh") == {BATCHED}
    assert forms(found, "reuse") == {BY_PRODUCT}
    for variant in ("plain", "refresh"):
        assert not host_reads(found.lowered(variant)[0])


def test_listed_weights_are_not_stacked_for_a_batched_product() -> None:
    assert forms(variants("I5"), "refresh") == {BY_PRODUCT}
