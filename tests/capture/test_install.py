"""What `install` recognises, what it refuses, and what it leaves untouched."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from capture import models
from capture.harness import (
    assert_equal,
    capturing,
    plain,
    reference,
    run_steps,
    wrapped_like_accelerate,
)
from capture.models import Denoiser, inputs, make
from moeca_compile.capture import compiling_for_moeca, install, prepare, uninstall
from quick import mostly_slow

METHOD = ["SortedLoop", "SlicedSortedLoop", "ConditionedSortedLoop", "HitListBank"]
STATEMENTS = ["SplitLoop", "HitList", "MaskLoop", "AppendLoop"]
REFUSED = {
    "CapacityLoop": "everything on one expert",
    "LoadLimit": "constant-row input",
    "UnequalLoop": "expert 1 has other parameters",
}


def capture(model: nn.Module) -> Any:
    return install(model, inputs(), {}, is_active=compiling_for_moeca)


def model_of(name: str) -> Denoiser:
    return make(getattr(models, name))


def attributes(model: nn.Module) -> list[dict[str, int]]:
    return [{name: id(value) for name, value in vars(m).items()} for m in model.modules()]


@pytest.mark.parametrize("name", METHOD + STATEMENTS)
def test_every_layer_is_replaced_by_the_expected_mechanism(name: str) -> None:
    report = capture(model_of(name))
    assert report.installed == 3
    mechanism = "method" if name in METHOD else "statements"
    assert {module.mechanism for module in report.modules} == {mechanism}
    assert [m.path.startswith(f"layers.{i}.moe") for i, m in enumerate(report.modules)] == [
        True
    ] * 3
    assert all(m.num_experts == models.EXPERTS for m in report.modules)
    assert all("models.py:" in m.location for m in report.modules)


@pytest.mark.parametrize("name", mostly_slow(STATEMENTS + METHOD, 3))
def test_fullgraph_after_prepare_equals_eager(name: str) -> None:
    model = model_of(name)
    steps = [inputs(step) for step in range(3)]
    expected = reference(model, steps)
    assert prepare(model, *inputs()).installed == 3
    counter, backend = capturing()
    outputs, added = run_steps(
        torch.compile(model, backend=backend, fullgraph=True), counter, steps
    )
    assert added == [1, 0, 0]
    assert_equal(outputs, expected)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refusals_name_reason_and_place_and_change_nothing(name: str) -> None:
    """At most the root's forward is new: it lets Dynamo keep what the loops read on the host."""
    model = model_of(name)
    before = attributes(model)
    report = capture(model)
    assert report.installed == 0 and len(report.modules) == 3
    assert REFUSED[name] in report.modules[0].reason
    assert "models.py:" in report.modules[0].location
    assert REFUSED[name] in str(report)
    (whole,) = report.others
    assert whole.accepted is (name == "CapacityLoop")
    assert whole.accepted or "no whole graph" in whole.reason and "models.py:" in whole.reason
    changed = attributes(model)
    assert set(changed[0]) - set(before[0]) == ({"forward"} if whole.accepted else set())
    assert changed[1:] == before[1:]
    uninstall(model)
    assert attributes(model) == before


def test_training_mode_is_refused() -> None:
    report = capture(model_of("SortedLoop").train())
    assert report.installed == 0
    assert "training mode" in report.modules[0].reason


@pytest.mark.parametrize("name", mostly_slow(["SortedLoop", "SplitLoop"], 1))
@pytest.mark.parametrize("mode", ["gradients", "training"])
def test_replacement_rests_under_gradients_and_in_training(name: str, mode: str) -> None:
    model = model_of(name)
    assert capture(model).installed == 3
    model.train(mode == "training")
    counter, backend = capturing()
    with torch.set_grad_enabled(mode == "gradients"):
        torch.compile(model, backend=backend)(*inputs())
    assert not any("select_experts" in graph.code for graph in counter.graphs)


def test_layers_without_experts_are_not_reported() -> None:
    assert capture(model_of("Dense")).modules == ()


@pytest.mark.parametrize("name", mostly_slow(["SortedLoop", "SplitLoop"], 1))
def test_zero_initialised_and_identical_experts_are_told_apart(name: str) -> None:
    model = model_of(name)
    for layer in model.layers:
        for expert in layer.moe.bank:
            expert.down.weight.zero_()
            expert.down.bias.zero_()
    assert capture(model).installed == 3
    assert not any(p.any() for p in model.layers[0].moe.bank[0].down.parameters())


@pytest.mark.parametrize("name", mostly_slow(STATEMENTS + METHOD, 3))
def test_reduced_precision_keeps_the_original_dtypes(name: str) -> None:
    model = model_of(name).bfloat16()
    steps = [tuple(t.bfloat16() for t in inputs(step)) for step in range(2)]
    expected = reference(model, steps)
    assert install(model, steps[0], {}, is_active=compiling_for_moeca).installed == 3
    counter, backend = capturing()
    outputs, added = run_steps(torch.compile(model, backend=backend), counter, steps)
    assert added == [1, 0]
    for found, wanted in zip(outputs, expected):
        assert found.dtype is wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))


def test_eager_users_get_the_original_arithmetic() -> None:
    model = model_of("SortedLoop")
    expected = model(*inputs())
    calls: list[int] = []
    bank = model.layers[0].moe.bank
    hooks = [e.register_forward_pre_hook(lambda _, a: calls.append(a[0].shape[0])) for e in bank]
    capture(model)
    calls.clear()
    assert torch.equal(model(*inputs()), expected)
    assert sum(calls) == 14 * models.SLOTS, "every expert on every row would be 14 * EXPERTS"
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", mostly_slow(["SplitLoop", "SortedLoop", "MaskLoop"], 0))
def test_other_backends_see_the_graphs_they_saw_before(name: str) -> None:
    codes = []
    for captured in (False, True):
        torch._dynamo.reset()
        model = model_of(name)
        if captured:
            assert capture(model).installed == 3
        counter, backend = plain()
        run_steps(torch.compile(model, backend=backend), counter, [inputs(0), inputs(1)])
        codes.append(
            [
                [str(n.target) for n in g.graph.nodes if n.op == "call_function"]
                for g in counter.graphs
            ]
        )
    assert codes[0] == codes[1]
    assert len(codes[0]) > 1


@pytest.mark.parametrize("name", mostly_slow(["SortedLoop", "SplitLoop"], 1))
def test_deepcopy_of_an_installed_model_uses_its_own_weights(name: str) -> None:
    model = model_of(name)
    capture(model)
    clone = copy.deepcopy(model)
    for parameter in clone.parameters():
        parameter.mul_(0.9)
    expected = clone(*inputs())
    counter, backend = capturing()
    outputs, added = run_steps(torch.compile(clone, backend=backend), counter, [inputs()])
    assert added == [1]
    assert_equal(outputs, [expected])
    uninstall(clone)
    assert capture(model).installed == 3, "the original is independent of its copy"


@pytest.mark.parametrize("name", mostly_slow(["SortedLoop", "SplitLoop"], 1))
def test_an_installed_model_survives_save_and_load(name: str) -> None:
    model = model_of(name)
    expected = model(*inputs())
    capture(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(*inputs()), expected)
    assert capture(loaded).installed == 3


@pytest.mark.parametrize("name", mostly_slow(["SortedLoop", "SplitLoop"], 1))
def test_instance_wrappers_stay_in_place(name: str) -> None:
    model = model_of(name)
    for layer in model.layers:
        wrapped_like_accelerate(layer.moe)
    expected = reference(model, [inputs()])
    before = [vars(layer.moe)["forward"] for layer in model.layers]
    assert capture(model).installed == 3
    assert [vars(layer.moe)["forward"] for layer in model.layers] == before
    counter, backend = capturing()
    outputs, added = run_steps(torch.compile(model, backend=backend), counter, [inputs()])
    assert added == [1]
    assert_equal(outputs, expected)
    uninstall(model)
    assert [vars(layer.moe)["forward"] for layer in model.layers] == before
    assert torch.equal(model(*inputs()), expected[0])


@pytest.mark.parametrize("name", mostly_slow(STATEMENTS + METHOD, 3))
def test_uninstall_leaves_the_model_as_it_was(name: str) -> None:
    model = model_of(name)
    before = [dict(vars(m)) for m in model.modules()]
    capture(model)
    capture(model)
    uninstall(model)
    after = [dict(vars(m)) for m in model.modules()]
    assert [list(a) for a in after] == [list(b) for b in before]


class Restless(models.SplitLoop):
    """Stores tensors, fills a list and a buffer, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[Tensor] = []
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor, c: Tensor, record: dict[str, Tensor] | None = None) -> Tensor:
        self.history.append(x)
        self.seen += 1
        self.noise = torch.rand(1)
        return super().forward(x, c, record)


def test_analysis_leaves_no_trace_in_the_model() -> None:
    model = make(Restless)
    state = torch.get_rng_state()
    before = attributes(model)
    assert install(model, inputs(), {}, is_active=compiling_for_moeca).modules
    uninstall(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert attributes(model) == before
    assert not model.layers[0].moe.history
    assert float(model.layers[0].moe.seen) == 0.0


class Failing(models.SplitLoop):
    def forward(self, x: Tensor, c: Tensor, record: dict[str, Tensor] | None = None) -> Tensor:
        super().forward(x, c, record)
        raise RuntimeError("on purpose")


def test_a_failing_forward_leaves_nothing_installed() -> None:
    model = make(Failing)
    before = attributes(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        capture(model)
    assert attributes(model) == before


def test_tracebacks_of_replaced_code_point_at_the_users_file() -> None:
    model = model_of("SplitLoop")
    capture(model)
    override = model.layers[0].moe.forward.__func__
    names = {
        cell.cell_contents.__code__.co_filename
        for cell in override.__closure__
        if hasattr(cell.cell_contents, "__code__")
    }
    assert models.__file__ in names
    assert override.__name__ == "forward"
