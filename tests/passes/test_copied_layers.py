"""A copied layer is, node by node, what tracing it gives; what differs is traced."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch._guards import TracingContext, tracing

import moeca_compile.passes.insert_cache as insert_cache
from aten_graphs import described
from compat.cases import hidream
from graph_runs import compile_model, only_entry, use_graph_level
from idioms import make, trajectory
from moeca_compile.backend import moeca
from moeca_compile.graph.counterparts import Different
from moeca_compile.passes.copied_layers import CopiedLayers
from moeca_compile.torch_compat import new_fake_mode

DEPTH = 4
ROWS: dict[str, Any] = {"policy": "moeca", "interval": 3, "budget": 0.3}
OPTIONS: dict[str, dict[str, Any]] = {
    "auto": {"policy": "auto"},
    "attention_first": {**ROWS, "order": "attention_first"},
    "router_first": ROWS,
    "threshold": {"policy": "moeca", "interval": 3},
    "slopes": {**ROWS, "forecast_order": 1},
    "evidence": {**ROWS, "tolerance": 0.1},
    "ages": {"policy": "toca", "interval": 3, "budget": 0.3},
    "layers": {"policy": "taylorseer", "interval": 3, "forecast_order": 2},
    "bfloat16 rows": {**ROWS, "cache_dtype": "bfloat16"},
}


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[CopiedLayers]:
    """All builders made in a test."""
    made: list[CopiedLayers] = []

    class Watched(CopiedLayers):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(insert_cache, "CopiedLayers", Watched)
    return made


def variants_of(monkeypatch: pytest.MonkeyPatch, model: nn.Module, **options: Any) -> Any:
    use_graph_level(monkeypatch)
    (call,) = trajectory(model, 1)
    compiled = compile_model(model, call, **options)
    with torch.no_grad():
        compiled(*call)
    return only_entry(compiled).variants


def names(variants: Any) -> list[str]:
    """Variants that compute layers."""
    return ["plain", "refresh", *(variants.analysis.plan.variants & {"reuse"})]


def check(
    monkeypatch: pytest.MonkeyPatch,
    copies: list[CopiedLayers],
    model: nn.Module,
    least: int,
    **options: Any,
) -> None:
    compare(monkeypatch, copies, variants_of(monkeypatch, model, **options), least)


def compare(
    monkeypatch: pytest.MonkeyPatch, copies: list[CopiedLayers], variants: Any, least: int
) -> None:
    for variant in names(variants):
        copies.clear()
        copied = variants.dialect(variant)[0]
        assert copies[0].copied >= least, variant
        with monkeypatch.context() as patch:
            patch.setattr(CopiedLayers, "_copy", refuse)
            traced = variants.dialect(variant)[0]
        assert described(copied) == described(traced), variant


def mostly_slow(names: Iterable[str], quick: list[str]) -> list[Any]:
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


def refuse(*_: Any) -> Any:
    raise Different


@pytest.mark.parametrize("name", mostly_slow(OPTIONS, ["attention_first"]))
def test_of_every_policy(
    monkeypatch: pytest.MonkeyPatch, copies: list[CopiedLayers], name: str
) -> None:
    model = make("I1", num_experts=4, depth=DEPTH, shared=True)
    check(monkeypatch, copies, model, DEPTH - 1, **OPTIONS[name])


def test_inside_of_a_backend_call(
    monkeypatch: pytest.MonkeyPatch, copies: list[CopiedLayers]
) -> None:
    """`moeca dump` traces there. The current fake mode is Dynamo's, and the sizes that the
    threshold leaves open are not its own."""
    model = make("I1", num_experts=4, depth=DEPTH, shared=True)
    variants = variants_of(monkeypatch, model, **OPTIONS["threshold"])
    copies.clear()
    with tracing(TracingContext(new_fake_mode())):
        variants.dialect("reuse")
    assert copies[0].copied >= DEPTH - 1


@pytest.mark.parametrize("order", ["attention_first", "router_first"])
@pytest.mark.parametrize("idiom", mostly_slow(["I2", "I3", "I5", "I6", "I7", "I8"], []))
def test_of_other_dispatches(
    monkeypatch: pytest.MonkeyPatch, copies: list[CopiedLayers], idiom: str, order: str
) -> None:
    model = make(idiom, num_experts=4, depth=DEPTH, shared=True)
    least = DEPTH - (2 if idiom == "I6" else 1)  # I6's first layer makes a constant for all
    check(monkeypatch, copies, model, least, **{**ROWS, "order": order})


@pytest.mark.slow
@pytest.mark.parametrize("order", ["attention_first", "router_first"])
def test_layers_with_a_part_of_an_input_each(
    monkeypatch: pytest.MonkeyPatch, copies: list[CopiedLayers], order: str
) -> None:
    """HiDream: each block has its own of the text states; all look up the same table of angles."""
    pytest.importorskip("diffusers")
    use_graph_level(monkeypatch)
    model, calls = hidream.make(packed=True, joint=1, single=6)
    model.eval()
    compiled = torch.compile(model, backend=moeca, options={**ROWS, "order": order})
    with torch.no_grad():
        for call in calls[:3]:  # captured, refresh, reuse
            compiled(**call)
    variants = only_entry(compiled).variants
    compare(monkeypatch, copies, variants, 4)
    assert re.search(r"[3-6] x", variants.pieces["reuse"])


@pytest.mark.slow
def test_constants_of_a_layer_are_traced(
    monkeypatch: pytest.MonkeyPatch, copies: list[CopiedLayers]
) -> None:
    """I4's layers hold a tensor each in the graph itself."""
    model = make("I4", num_experts=4, depth=DEPTH, shared=True)
    check(monkeypatch, copies, model, 0, **ROWS)
    assert copies[0].copied == 0


def test_a_layer_that_differs_is_traced(
    monkeypatch: pytest.MonkeyPatch, copies: list[CopiedLayers]
) -> None:
    model = make("I2", num_experts=4, depth=DEPTH, shared=True)
    norms = [m for m in model.blocks[2].modules() if isinstance(m, nn.LayerNorm)]
    norms[0].eps *= 2
    check(monkeypatch, copies, model, 1, **ROWS)  # the fourth is the second again
    assert copies[0].copied == 1
