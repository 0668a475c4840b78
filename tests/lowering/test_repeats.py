"""Blocks of whole models are compiled once; test_pieces.py has what counts as a repeat."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import moeca_compile
import moeca_compile.lowering.variants as variants_module
from graph_runs import compile_model, only_entry, use_graph_level
from idioms import make, trajectory
from moeca_compile import Options
from moeca_compile.torch_compat import without_kernels

DEPTH = 4
QUICK = ("attention_first",)
ROWS: dict[str, Any] = {"interval": 3, "budget": 0.3}
OPTIONS: dict[str, dict[str, Any]] = {
    "auto": {"tolerance": 1.0},
    "attention_first": {**ROWS, "order": "attention_first"},
    "router_first": ROWS,
    "threshold": {"interval": 3},
    "slopes": {**ROWS, "forecast_order": 1},
    "layers": {"policy": "taylorseer", "interval": 3},
    "histories": {"policy": "output_forecast", "interval": 3, "forecast_order": 2},
}


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OPTIONS]
)
def test_outputs_are_those_of_one_graph(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check(monkeypatch, "I1", OPTIONS[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "idiom, together",
    [("I2", DEPTH), ("I5", DEPTH), ("I7", DEPTH - 1)],  # I7: the last layer's refresh is apart
)
def test_of_other_dispatches(monkeypatch: pytest.MonkeyPatch, idiom: str, together: int) -> None:
    check(monkeypatch, idiom, OPTIONS["attention_first"], together)


def check(
    monkeypatch: pytest.MonkeyPatch, idiom: str, options: dict[str, Any], together: int = DEPTH
) -> None:
    """Bit by bit over a generation; every variant that has layers has them in one piece."""
    use_graph_level(monkeypatch)
    model = make(idiom, num_experts=4, depth=DEPTH, shared=True)
    calls = trajectory(model, 5, dx=0.05)
    compiled = compile_model(model, calls[0], **options)
    with torch.no_grad():
        in_pieces = [compiled(*call) for call in calls]
    variants = only_entry(compiled).variants
    assert set(variants.pieces) == set(variants.compile_seconds) - {"skip"}
    repeats = {v: max(map(int, re.findall(r"(\d+) x", p))) for v, p in variants.pieces.items()}
    assert min(repeats.values()) >= together, variants.pieces
    variants._compiled.clear()
    variants.pieces.clear()
    variants.options = Options.parse(variants.options, compile_repeats=False)
    moeca_compile.reset(compiled)
    with torch.no_grad():
        whole = [compiled(*call) for call in calls]
    assert not variants.pieces
    assert all(torch.equal(a, b) for a, b in zip(in_pieces, whole, strict=True))


@pytest.mark.slow
def test_a_variant_is_three_compilations_at_any_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: list[int] = []  # of each graph that is compiled

    def count(gm: GraphModule, *_: Any) -> GraphModule:
        nodes.append(sum(n.op == "call_function" for n in gm.graph.nodes))
        return gm

    monkeypatch.setattr(variants_module, "inductor", count)
    sizes = {}
    for depth in (4, 6):
        torch._dynamo.reset()
        model = make("I1", num_experts=4, depth=depth)
        call = trajectory(model, 1)[0]
        nodes.clear()
        with torch.no_grad():
            compile_model(model, call, **OPTIONS["attention_first"])(*call)
        sizes[depth] = list(nodes)
    assert len(sizes[4]) == len(sizes[6]) == 3
    assert sizes[6][:2] == sizes[4][:2]
    assert sum(sizes[6]) <= sum(sizes[4]) + 6  # counts of two more layers are told apart


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("name", ["attention_first", "histories", "layers"])
def test_with_inductor(name: str) -> None:
    model = make("I1", num_experts=4, depth=4)
    calls = trajectory(model, 8, dx=0.05)
    outputs = []
    for compile_repeats in (True, False):
        torch._dynamo.reset()
        options = {**OPTIONS[name], "compile_repeats": compile_repeats}
        compiled = compile_model(model, calls[0], **options)
        with torch.no_grad():
            outputs.append([compiled(*call).clone() for call in (*calls, *calls[:2])])
        assert bool(only_entry(compiled).variants.pieces) == compile_repeats
        assert moeca_compile.stats(compiled).refresh_steps < len(calls)
    for a, b in zip(*outputs, strict=True):
        assert (a - b).norm() / b.norm() < 1e-5


@pytest.mark.slow
def test_copied_layers_read_sizes_of_their_own() -> None:
    """One graph with a size of its own in every layer, by Inductor: copies keep what bounds it."""
    model = make("I1", num_experts=4, depth=DEPTH, shared=True)
    calls = trajectory(model, 3, dx=0.05)
    given = {"policy": "moeca", "interval": 3, "compile_repeats": False}
    outputs = []
    for context in (nullcontext(), without_kernels()):
        compiled = compile_model(model, calls[0], **given)
        with torch.no_grad(), context:
            outputs.append([compiled(*call) for call in calls])
        torch._dynamo.reset()
    for compiled_one, as_is in zip(*outputs, strict=True):
        assert torch.allclose(compiled_one, as_is, atol=1e-5)
