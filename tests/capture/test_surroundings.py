"""An ordinary dispatch in a model that makes tracing hard for another reason."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import moeca_compile
from capture import models, surroundings
from capture.harness import assert_equal, capturing, op_counts, plain, reference, run_steps
from capture.models import Denoiser, inputs, make
from graph_runs import use_graph_level
from moeca_compile.capture import Phase, compiling_for_moeca, install
from moeca_compile.capture.report import ModuleCapture
from quick import mostly_slow

STEPS = [inputs(step) for step in range(4)]


def root_of(cls: type[Denoiser], moe: type[nn.Module] = models.SortedLoop) -> Denoiser:
    model = make(moe, layers=2)
    model.__class__ = cls
    return model


def layered(layer: type[nn.Module]) -> Denoiser:
    made = [layer(models.SortedLoop) for _ in range(2)]
    return surroundings.with_layers(make(models.SortedLoop, 1), made)


def captured(model: nn.Module) -> tuple[list[int], list[ModuleCapture], str]:
    """Graphs per step, what was done beside the dispatches, and the state's reason."""
    expected = reference(model, STEPS)
    counter, backend = capturing()
    outputs, added = run_steps(torch.compile(model, backend=backend), counter, STEPS)
    assert_equal(outputs, expected, atol=1e-5)
    state = counter.registry.state(model)
    assert state.phase is Phase.CAPTURED and state.report is not None
    assert state.report.installed == 2
    assert max(op_counts(graph)["select_experts"] for graph in counter.graphs) == 2
    return added, list(state.report.others), state.reason


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        ["CompiledDispatch", "InlineBranch", "CompiledHelper", "AutocastRouter", "ItemIndexed"], 2
    ),
)
def test_one_graph_from_the_second_call_on(name: str) -> None:
    added, others, _ = captured(make(getattr(surroundings, name), 2))
    assert added[1:] == [1, 0, 0]
    assert all(m.accepted for m in others)


@pytest.mark.parametrize(
    "moe", mostly_slow([models.SplitLoop, models.SortedLoop], 1), ids=lambda m: m.__name__
)
def test_a_break_before_all_dispatches_is_tolerated(moe: type[nn.Module]) -> None:
    added, _, reason = captured(root_of(surroundings.BreakBefore, moe))
    assert added[1:] == [2, 0, 0]
    assert "surroundings.py" in reason and "\n" not in reason


def test_a_number_read_before_the_layers_stays_in_the_graph() -> None:
    added, others, _ = captured(root_of(surroundings.ReadBefore))
    assert added[1:] == [1, 0, 0]
    assert [m.mechanism for m in others] == ["flags"]
    assert "ReadBefore.forward" in others[0].location


@pytest.mark.parametrize("root", [Denoiser, surroundings.ReadBefore], ids=lambda r: r.__name__)
@pytest.mark.parametrize("first", [0, 2])
def test_another_backend_in_turn_with_this_one(root: type[Denoiser], first: int) -> None:
    """The other one breaks on the dispatch and gives up on frames, before or after the capture;
    neither may make the other trace again."""
    model = root_of(root)
    expected = reference(model, STEPS)
    (counter, backend), (others, other_backend) = capturing(), plain()
    compiled, other = (torch.compile(model, backend=b) for b in (backend, other_backend))
    with torch.no_grad():
        for step in STEPS[:first]:
            compiled(*step)
        seen = []
        for turn, step in enumerate(STEPS * 2):
            assert_equal([other(*step), compiled(*step)], [expected[turn % 4]] * 2, atol=1e-5)
            seen.append((len(counter.graphs), len(others.graphs)))
    assert counter.registry.state(model).phase is Phase.CAPTURED
    assert seen[2:] == [seen[1]] * 6
    assert not first or seen[0][0] == seen[1][0]


def test_a_root_that_turns_gradients_off_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    use_graph_level(monkeypatch)
    model = root_of(surroundings.WithoutGradients).requires_grad_(True)
    expected = reference(model, STEPS)
    compiled = torch.compile(model, backend="moeca", options={"interval": 1})
    with torch.enable_grad():
        outputs = [compiled(*step) for step in STEPS]
        assert moeca_compile.explain(model, *STEPS[0]).matched
    assert not any(output.requires_grad for output in outputs)
    assert_equal(outputs, expected, atol=1e-5)
    assert moeca_compile.stats(compiled).plain_steps == len(STEPS) - 1


@pytest.mark.filterwarnings("ignore:`?torch.backends.cuda.sdp_kernel:FutureWarning")
@pytest.mark.parametrize("layer", ["Attending", "NewAttending"])
def test_chosen_attention_kernels(layer: str) -> None:
    added, others, _ = captured(layered(getattr(surroundings, layer)))
    assert added[1:] == [1, 0, 0]
    assert [m.mechanism for m in others] == ["contexts"] * (2 * (layer == "Attending"))


@pytest.mark.slow
def test_many_layers_that_share_no_compiled_code_hit_no_limit() -> None:
    made = [surroundings.Numbered(models.SortedLoop, number) for number in range(10)]
    model = surroundings.with_layers(make(models.SortedLoop, 1), made)
    counter, backend = capturing()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, added = run_steps(torch.compile(model, backend=backend), counter, STEPS[:3])
    assert added == [1, 1, 0]
    assert torch._dynamo.config.recompile_limit == 8


def test_a_branch_that_does_something_for_an_empty_selection_stays() -> None:
    model = make(surroundings.OtherwiseBranch, 2)
    report = install(model, inputs(), {}, is_active=compiling_for_moeca)
    whole = report.others[-1]
    assert not whole.accepted
    assert "OtherwiseBranch.forward" in whole.location
    assert "surroundings.py" in whole.reason and "no whole graph" in whole.reason


def test_a_method_reached_through_super_is_refused() -> None:
    """Replacing it by its name would skip what the subclass adds."""
    model = make(surroundings.ThroughSuper, 2)
    expected = reference(model, STEPS)
    report = install(model, inputs(), {}, is_active=compiling_for_moeca)
    assert report.installed == 0
    assert "SplitLoop.forward is called through super()" in report.modules[0].reason
    counter, backend = capturing()
    outputs, _ = run_steps(torch.compile(model, backend=backend), counter, STEPS)
    assert_equal(outputs, expected, atol=1e-5)
