"""From plain `torch.compile` on an unseen class to one graph at the second call."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from capture import models
from capture.harness import (
    assert_equal,
    capturing,
    op_counts,
    plain,
    reference,
    run_steps,
    wrapped_like_accelerate,
)
from capture.models import DIM, EXPERTS, Denoiser, inputs, make
from moeca_compile.capture import Phase, find_root
from quick import mostly_slow

CAPTURED = ["SortedLoop", "HitList", "SplitLoop", "SlicedSortedLoop", "ConditionedSortedLoop"]
CAPTURED += ["HitListBank", "MaskLoop", "AppendLoop"]
STEPS = [inputs(step) for step in range(5)]


def as_module(model: nn.Module, backend: Any) -> Callable[..., Tensor]:
    return torch.compile(model, backend=backend)


def in_place(model: nn.Module, backend: Any) -> Callable[..., Tensor]:
    model.compile(backend=backend)
    return model


def bound_forward(model: nn.Module, backend: Any) -> Callable[..., Tensor]:
    return torch.compile(model.forward, backend=backend)


def inside_function(model: nn.Module, backend: Any) -> Callable[..., Tensor]:
    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return model(x * 1.0, t)

    return torch.compile(denoise, backend=backend)


@pytest.mark.parametrize("name", mostly_slow(CAPTURED, 2))
def test_second_call_is_one_graph_and_later_calls_compile_nothing(name: str) -> None:
    model = make(getattr(models, name))
    expected = reference(model, STEPS)
    counter, backend = capturing()
    outputs, added = run_steps(torch.compile(model, backend=backend), counter, STEPS)
    assert added == [1, 1, 0, 0, 0]  # the fragment before the first dispatch, and the whole
    assert_equal(outputs, expected)
    counts = op_counts(counter.graphs[-1])
    rows = 2 if name == "ConditionedSortedLoop" else 1
    assert counts == {"expert_rows": 3 * EXPERTS * rows, "select_experts": 3, "topk": 3}
    state = counter.registry.state(model)
    assert state.phase is Phase.CAPTURED
    assert (state.graphs_before, state.graphs_after) == (added[0], 1)
    assert state.report is not None and state.report.installed == 3


@pytest.mark.parametrize(
    "compile_", mostly_slow([as_module, bound_forward, in_place, inside_function], 2)
)
@pytest.mark.parametrize("name", mostly_slow(["SplitLoop", "SortedLoop"], 1))
def test_every_way_to_compile_a_model(
    compile_: Callable[[nn.Module, Any], Callable[..., Tensor]], name: str
) -> None:
    model = make(getattr(models, name))
    expected = reference(model, STEPS)
    counter, backend = capturing()
    outputs, added = run_steps(compile_(model, backend), counter, STEPS)
    assert added[1:] == [1, 0, 0, 0]
    assert_equal(outputs, expected)
    assert counter.registry.state(model).phase is Phase.CAPTURED


@pytest.mark.parametrize("name", mostly_slow(["SplitLoop", "SortedLoop"], 1))
def test_inference_mode(name: str) -> None:
    model = make(getattr(models, name))
    expected = reference(model, STEPS)
    counter, backend = capturing()
    with torch.inference_mode():
        outputs, added = run_steps(torch.compile(model, backend=backend), counter, STEPS)
    assert added[1:] == [1, 0, 0, 0]
    assert_equal([output.clone() for output in outputs], expected)


def test_another_batch_size_costs_one_graph() -> None:
    model = make(models.SplitLoop)
    steps = [inputs(0), inputs(1), inputs(2, batch=3), inputs(3, batch=5)]
    expected = reference(model, steps)
    counter, backend = capturing()
    outputs, added = run_steps(torch.compile(model, backend=backend), counter, steps)
    assert added[1:] == [1, 1, 0]
    assert_equal(outputs, expected)


class Decorated(Denoiser):
    """A root whose forward is wrapped, as diffusers does it."""

    @staticmethod
    def _logged(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(function)
        def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            return function(self, *args, **kwargs)

        return wrapper

    forward = _logged(Denoiser.forward)


@pytest.mark.parametrize("how", mostly_slow(["decorated", "shadowed"], 1))
def test_wrapped_root_forward(how: str) -> None:
    model = make(models.SortedLoop)
    if how == "decorated":
        model.__class__ = Decorated
    else:
        wrapped_like_accelerate(model)
    expected = reference(model, STEPS)
    counter, backend = capturing()
    outputs, added = run_steps(torch.compile(model, backend=backend), counter, STEPS)
    assert added[1:] == [1, 0, 0, 0]
    assert_equal(outputs, expected)


class BrokenElsewhere(models.SortedLoop):
    """Breaks the graph in every layer, outside of its dispatch."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x, c)


@pytest.mark.filterwarnings("ignore:Dynamo")
def test_a_model_that_still_breaks_is_put_back() -> None:
    model = make(BrokenElsewhere)
    expected = reference(model, STEPS)
    counter, backend = capturing()
    outputs, added = run_steps(torch.compile(model, backend=backend), counter, STEPS)
    assert_equal(outputs, expected)
    state = counter.registry.state(model)
    assert state.phase is Phase.REFUSED
    assert "still broken" in state.reason
    assert not any("run_routed" in vars(module) for module in model.modules())
    assert added[4] == 0


class BrokenTail(Denoiser):
    """Reads a number on the host after its last layer."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = super().forward(x, t)
        return y * (1.0 + float(t[0]))


@pytest.mark.parametrize("name", mostly_slow(["SplitLoop", "SortedLoop"], 1))
def test_a_break_outside_of_all_dispatches_is_tolerated(name: str) -> None:
    model = make(getattr(models, name))
    model.__class__ = BrokenTail
    expected = reference(model, STEPS)
    counter, backend = capturing()
    outputs, added = run_steps(torch.compile(model, backend=backend), counter, STEPS)
    assert_equal(outputs, expected, atol=1e-5)
    state = counter.registry.state(model)
    assert state.phase is Phase.CAPTURED
    assert "test_trigger.py" in state.reason
    second = counter.graphs[added[0] : added[0] + added[1]]
    holding = [op_counts(graph)["select_experts"] for graph in second]
    assert sorted(holding) == [0] * (added[1] - 1) + [3]
    assert added[3:] == [0, 0]


def test_a_refused_model_runs_as_fragments() -> None:
    model = make(models.UnequalLoop)
    expected = reference(model, STEPS)
    counter, backend = capturing()
    outputs, _ = run_steps(torch.compile(model, backend=backend), counter, STEPS)
    assert_equal(outputs, expected)
    state = counter.registry.state(model)
    assert state.phase is Phase.REFUSED
    assert state.report is not None and state.report.installed == 0


@pytest.mark.slow
def test_a_refused_model_is_one_graph_as_written_where_dynamo_can() -> None:
    model = make(models.CapacityLoop)
    expected = reference(model, STEPS)
    counter, backend = capturing()
    outputs, added = run_steps(torch.compile(model, backend=backend), counter, STEPS)
    assert added[1:] == [1, 0, 0, 0]
    assert_equal(outputs, expected)
    assert op_counts(counter.graphs[-1])["select_experts"] == 0
    state = counter.registry.state(model)
    assert state.phase is Phase.CAPTURED
    assert state.report is not None and state.report.installed == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SplitLoop", "SortedLoop"])
def test_gradients_only_postpone_the_analysis(name: str) -> None:
    model = make(getattr(models, name))
    counter, backend = capturing()
    compiled = torch.compile(model, backend=backend)
    with torch.enable_grad():
        compiled(*STEPS[0])
    assert counter.registry.state(model).phase is Phase.NEW
    _, added = run_steps(compiled, counter, STEPS)
    assert counter.registry.state(model).phase is Phase.CAPTURED
    assert added[1:] == [1, 0, 0, 0]


def test_models_without_banks_are_left_alone() -> None:
    model = make(models.Dense)
    counter, backend = capturing()
    returned: list[Any] = []

    def spying(gm: Any, example_inputs: Any) -> Any:
        run = backend(gm, example_inputs)
        returned.append((gm, run))
        return run

    run_steps(torch.compile(model, backend=spying), counter, STEPS)
    assert [run.__self__ is gm for gm, run in returned] == [True], "not even wrapped"
    assert counter.registry.state(model).report is None


@pytest.mark.slow
def test_another_backend_on_a_captured_model_sees_its_own_graphs() -> None:
    model = make(models.SortedLoop)
    untouched = make(models.SortedLoop)
    expected = reference(model, STEPS)
    counter, backend = capturing()
    run_steps(torch.compile(model, backend=backend), counter, STEPS)
    torch._dynamo.reset()
    seen = []
    for subject in (untouched, model):
        torch._dynamo.reset()
        other, other_backend = plain()
        outputs, _ = run_steps(torch.compile(subject, backend=other_backend), other, STEPS[:2])
        assert_equal(outputs, expected[:2])
        seen.append([graph.code for graph in other.graphs])
    assert len(seen[0]) == len(seen[1])
    assert not any("select_experts" in code for code in seen[1])


@pytest.mark.slow
def test_two_models_of_one_class_are_both_captured() -> None:
    first, second = make(models.SplitLoop), make(models.SplitLoop, seed=1)
    counter, backend = capturing()
    compiled = [torch.compile(model, backend=backend) for model in (first, second)]
    for step in STEPS:
        for model, run in zip((first, second), compiled):
            assert_equal([run(*step)], [model(*step)])
    phases = [counter.registry.state(model).phase for model in (first, second)]
    assert phases == [Phase.CAPTURED] * 2


@pytest.mark.slow
def test_registry_keeps_no_model_alive() -> None:
    model = make(models.SortedLoop)
    counter, backend = capturing()
    run_steps(torch.compile(model, backend=backend), counter, STEPS[:2])
    gone = weakref.ref(model)
    counter.graphs.clear()
    del model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


def test_find_root_outside_of_a_compiled_call() -> None:
    assert find_root() is None


def test_model_made_of_torch_modules_only() -> None:
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.SiLU(), nn.Linear(DIM, DIM)).eval()
    counter, backend = capturing()
    _, added = run_steps(torch.compile(model, backend=backend), counter, [(s[0],) for s in STEPS])
    assert added == [1, 0, 0, 0, 0]
