"""Every dispatch idiom becomes one graph through plain `torch.compile`, from the second call on."""

from __future__ import annotations

import pytest
import torch

from capture.harness import assert_equal, capturing, op_counts, reference, run_steps
from idioms import DISPATCHES, EXPERT_CHOICE, inputs, make, trajectory
from moeca_compile import explain
from moeca_compile.capture import Phase
from quick import mostly_slow

# grouped products are traced in bfloat16 only, where equal scores are common; see test_exact.py
PYTHON_LOOPS = sorted(set(DISPATCHES) - {"I8", "I9", "I6_grouped", "I5", "I1_capacity"})
MECHANISMS = {
    "I4": {"branches", "flags"},
    "I6": {"flags"},
    "I7": {"flags"},
}


@pytest.mark.parametrize("idiom", mostly_slow(PYTHON_LOOPS, 4))
def test_one_graph_from_the_second_call_on(idiom: str) -> None:
    model = make(idiom)
    steps = trajectory(model, 4)
    expected = reference(model, steps)
    counter, backend = capturing()
    outputs, added = run_steps(torch.compile(model, backend=backend), counter, steps)
    assert added == [1, 1, 0, 0]
    assert_equal(outputs, expected, atol=1e-5)
    state = counter.registry.state(model)
    assert state.phase is Phase.CAPTURED and state.report is not None
    assert {m.mechanism for m in state.report.others} == MECHANISMS.get(idiom, set())
    layers = 0 if idiom in EXPERT_CHOICE else 2
    assert state.report.installed == layers
    assert op_counts(counter.graphs[-1])["select_experts"] == layers


@pytest.mark.parametrize("idiom", ["I7", pytest.param("I4", marks=pytest.mark.slow)])
def test_another_routing_in_the_captured_graph(idiom: str) -> None:
    """Sizes that were seen while capturing are not part of the graph."""
    model = make(idiom, depth=1)
    x, t, y = trajectory(model, 1)[0]
    labels = [y, y.flip(0), torch.full_like(y, 3), torch.full_like(y, 10)]
    inputs = [(x * scale, t, label) for label, scale in zip(labels, (1.0, 3.0, 0.0, -2.0))]
    steps = [inputs[0], *inputs]
    expected = reference(model, steps)
    counter, backend = capturing()
    outputs, added = run_steps(torch.compile(model, backend=backend), counter, steps)
    assert added[2:] == [0, 0, 0]
    assert_equal(outputs, expected, atol=1e-5)


@pytest.mark.parametrize("idiom", mostly_slow(["I1", "I2", "split"], 1))
def test_router_weights_that_are_all_one_are_part_of_the_dispatch(idiom: str) -> None:
    """Softmax over one logit: the sum is right without them, but no layer is found then."""
    model = make(idiom, router="topk_softmax", top_k=1, depth=1)
    report = explain(model, *inputs(model))
    assert report.matched
    assert "moe" in {region.kind for region in report.regions}
