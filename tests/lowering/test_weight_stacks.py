"""Weights of expert modules stacked once a generation: the same values, and never old ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from graph_runs import compile_model, only_entry, use_graph_level
from idioms import make, trajectory
from moeca_compile.lowering import grouped, weight_stacks
from moeca_compile.lowering.variants import Variants, host_reads
from moeca_compile.lowering.weight_stacks import WeightStacks
from moeca_compile.passes import run_experts

aten = torch.ops.aten
BUDGETED = {"policy": "moeca", "interval": 4, "budget": 0.25, "order": "attention_first"}


class Made:
    """A bfloat16 model with expert modules whose lowered graphs are those of a GPU, run as they
    are: gate, up and down of two layers are six stacks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        use_graph_level(monkeypatch)
        monkeypatch.setattr(grouped, "on_device", lambda rows, weights: True)
        monkeypatch.setattr(run_experts, "expert_program", lambda body, inputs: None)
        self.model = make("I1", depth=2, num_experts=4, expert="swiglu").bfloat16()
        self.calls = [(x.bfloat16(), t, y) for x, t, y in trajectory(self.model, 4, dx=0.05)]
        self.compiled = compile_model(self.model, self.calls[0], **{**BUDGETED, **options})

    def run(self, count: int = 4) -> list[Tensor]:
        with torch.no_grad():
            return [self.compiled(*call) for call in self.calls[:count]]

    @property
    def variants(self) -> Variants:
        return only_entry(self.compiled).variants

    def lowered(self, kind: str) -> GraphModule:
        return self.variants.lowered(kind)[0]

    def stacks(self, kind: str) -> list[Tensor]:
        stacks = self.variants.stacks
        return [stacks._tensors[recipe] for recipe in stacks._recipes[kind]]


def test_hoisted_graphs_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refresh, reuse and a second generation; nothing is stacked within a step."""
    made = Made(monkeypatch)
    found = made.run() + made.run()
    assert len(made.stacks("refresh")) == 6
    assert made.variants.stacks.nbytes == sum(t.nbytes for t in made.stacks("reuse"))
    monkeypatch.setattr(weight_stacks, "_fits", lambda new: False)
    other = Made(monkeypatch)
    expected = other.run() + other.run()
    assert all(map(torch.equal, found, expected))
    assert not other.variants.stacks and other.variants.stacks.nbytes == 0
    stacked = other.lowered("reuse").graph.find_nodes(op="call_function", target=aten.stack.default)
    assert len(stacked) >= 6, "where they do not fit, each step stacks"


def test_variants_share_one_copy_at_one_address(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(monkeypatch)
    made.run()
    addresses = [{t.data_ptr() for t in made.stacks(kind)} for kind in ("refresh", "reuse")]
    assert addresses[0] == addresses[1] and len(addresses[0]) == 6
    made.run()
    assert {t.data_ptr() for t in made.stacks("refresh")} == addresses[0], "CUDA graphs need that"
    only_entry(made.compiled).release()
    assert not made.variants.stacks and made.variants.stacks.nbytes == 0


def test_a_new_generation_and_a_changed_weight_renew_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edits that torch records at once; those it does not (`.data`) with the next generation."""
    made = Made(monkeypatch)
    made.run(2)
    weight = made.model.blocks[0].moe.experts[0].gate_proj.weight

    def holds() -> bool:
        same = [t[0] for t in made.stacks("reuse") if t[0].shape == weight.shape]
        return any(torch.equal(t, weight) for t in same)

    assert holds()
    weight.data.mul_(-2)
    with torch.no_grad():
        made.compiled(*made.calls[2])
        assert not holds(), "torch keeps no record of this edit, cached rows outlive it too"
        found = made.compiled(*made.calls[0])
        assert holds(), "a new generation"
        assert torch.allclose(found, made.model(*made.calls[0]), rtol=0.1, atol=0.1)
        weight.mul_(3)
        found = made.compiled(*made.calls[1])
        assert holds(), "a weight that changed"
        assert torch.allclose(found, made.model(*made.calls[1]), rtol=0.1, atol=0.1)


def test_only_stacks_of_weights_are_taken() -> None:
    """Not of caches, of what was computed, nor along another dim."""
    graph = torch.fx.Graph()
    a, b, cache = (graph.placeholder(n) for n in ("a", "b", "cache"))
    twice = graph.call_function(aten.mul.Tensor, (b, 2))
    for parts, dim in (([a, cache], 0), ([a, twice], 0), ([a, b], 1)):
        graph.call_function(aten.stack.default, (parts, dim))
    graph.output(graph.call_function(aten.stack.default, ([b, a],)))
    value = torch.ones(2, 3)
    for node in graph.nodes:
        node.meta["val"] = torch.stack([value, value]) if "stack" in node.name else value
    gm, stacks = GraphModule(torch.nn.Module(), graph), WeightStacks()
    assert len(stacks.hoist("reuse", gm, {0, 1})) == 1
    first, second = torch.zeros(2, 3), torch.ones(2, 3)
    (made,) = stacks.values("reuse", [first, second, value])
    assert torch.equal(made, torch.stack([second, first]))
    assert torch.equal(gm(first, second, value, made), made)


def test_cuda_graphs_are_not_asked_for_where_the_host_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fixed counts and grouped products: nothing is read. The threshold rule, and the products that
    run expert by expert, read."""
    replayed = {"triton.cudagraphs": True}
    made = Made(monkeypatch)
    made.run(1)
    made.variants._config, made.variants.fixed_counts = replayed, True
    for kind in ("plain", "refresh", "reuse"):
        graph = made.lowered(kind)
        assert not host_reads(graph)
        assert made.variants._inductor_config(kind, graph)["triton.cudagraphs"]
    made.variants.fixed_counts = False
    read = {n.target for n in host_reads(made.lowered("reuse"))}
    assert read & {aten.item.default, aten._local_scalar_dense.default}
    monkeypatch.setattr(grouped, "on_device", lambda rows, weights: False)
    graph = made.lowered("refresh")
    assert {n.target for n in host_reads(graph)} == {torch.ops.moeca.grouped_linear.default}
    assert "triton.cudagraphs" not in made.variants._inductor_config("refresh", graph)
    assert replayed == {"triton.cudagraphs": True}
