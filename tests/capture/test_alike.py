"""A dispatch that repeats a proven one is checked once; one that may do anything else is not."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from capture.harness import assert_equal, capturing, reference, run_steps
from capture.models import CapacityLoop, HitList, SortedLoop, inputs, make
from moeca_compile.capture import compiling_for_moeca, install
from moeca_compile.capture.alike import same_kinds, same_modules
from moeca_compile.capture.report import CaptureReport

PROVEN = "reproduced with 2 slots per token"


def reasons(model: nn.Module) -> list[str]:
    report: CaptureReport = install(model, inputs(), {}, is_active=compiling_for_moeca)
    return [module.reason for module in report.modules]


@pytest.mark.parametrize("moe", [SortedLoop, HitList], ids=["method", "statements"])
def test_layers_that_repeat_the_first_are_replaced_and_say_so(moe: type[nn.Module]) -> None:
    model = make(moe)
    steps = [inputs(step) for step in range(2)]
    expected = reference(model, steps)
    assert reasons(model) == [PROVEN, *[f"{PROVEN}, as layers.0.moe"] * 2]
    counter, backend = capturing()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    outputs, added = run_steps(compiled, counter, steps)
    assert added == [1, 0]
    assert_equal(outputs, expected)


def other_setting(moe: nn.Module) -> None:
    moe.unused = 7


def other_object(moe: nn.Module) -> None:
    moe.config = SimpleNamespace(top_k=2)


def other_activation(moe: nn.Module) -> None:
    moe.bank[1].act = nn.ReLU()


def other_method(moe: nn.Module) -> None:
    moe.bank[1].forward = MethodType(type(moe.bank[1]).forward, moe.bank[1])


def other_hook(moe: nn.Module) -> None:
    moe.bank[1].register_forward_hook(lambda module, args, output: output)


def other_width(moe: nn.Module) -> None:
    for expert in moe.bank:
        expert.gate_up = nn.Linear(32, 32).requires_grad_(False)
        expert.down = nn.Linear(16, 32).requires_grad_(False)


@pytest.mark.parametrize(
    "change",
    [other_setting, other_object, other_activation, other_method, other_hook, other_width],
    ids=lambda change: change.__name__,
)
def test_whatever_is_not_the_same_is_analysed_in_full(
    change: Callable[[nn.Module], None],
) -> None:
    model = make(SortedLoop, 2)
    change(model.layers[1].moe)
    first, second = reasons(model)
    assert first == PROVEN
    assert "as layers" not in second


class Raising:
    """A setting that must not be asked whether it is another one."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not comparable")

    def __hash__(self) -> int:
        return 1


def test_a_setting_that_raises_when_compared_costs_the_short_cut_only() -> None:
    model = make(SortedLoop, 2)
    for layer in model.layers:
        layer.moe.held = frozenset({Raising()})
    assert reasons(model) == [PROVEN] * 2


class Limited(CapacityLoop):
    """Its capacity is a setting of the instance."""

    @property
    def capacity(self) -> int:
        return int(self.limit)


@pytest.mark.parametrize("kept", [int, torch.tensor], ids=["attribute", "buffer"])
def test_a_capacity_no_recorded_token_meets_is_found_in_a_later_layer(
    kept: Callable[[int], Any],
) -> None:
    model = make(Limited, 2)
    for layer, capacity in zip(model.layers, (10**6, 14), strict=True):
        value = kept(capacity)
        if isinstance(value, torch.Tensor):
            layer.moe.register_buffer("limit", value)
        else:
            layer.moe.limit = value
    first, second = reasons(model)
    assert first == PROVEN
    assert "other values" in second


class Steered(SortedLoop):
    """What it computes depends on a weight."""

    @torch.no_grad()
    def run_routed(self, rows: Tensor, picks: Tensor, gates: Tensor) -> Tensor:
        doubled = bool(self.gate.weight[0, 0] > 0)
        return super().run_routed(rows, picks, gates * 2 if doubled else gates)


def test_a_repeated_layer_that_differs_on_its_input_is_analysed_in_full() -> None:
    model = make(Steered, 2)
    for layer, sign in zip(model.layers, (-1, 1), strict=True):
        layer.moe.gate.weight[0, 0] = sign
    first, second = reasons(model)
    assert first == PROVEN
    assert "as layers" not in second


def test_modules_are_alike_whatever_their_weights_but_not_their_settings() -> None:
    one, other = (nn.BatchNorm1d(4) for _ in range(2))
    nn.init.normal_(other.weight)
    assert same_modules(one, other)
    other.num_batches_tracked += 1
    assert not same_modules(one, other)
    assert not same_modules(one, nn.BatchNorm1d(4, eps=1e-3))
    assert not same_modules(one, nn.BatchNorm1d(4, affine=False))
    assert not same_modules(nn.Sequential(nn.ReLU()), nn.Sequential(nn.GELU()))


def test_arguments_are_alike_by_shape_and_by_the_value_of_what_is_no_tensor() -> None:
    x = torch.zeros(2, 3)
    assert same_kinds(((x,), {"scale": 2.0}), ((x + 1,), {"scale": 2.0}))
    assert not same_kinds(((x,), {"scale": 2.0}), ((x,), {"scale": 3.0}))
    assert not same_kinds(((x,), {}), ((x[:1],), {}))
    assert not same_kinds(((x,), {}), ((x.double(),), {}))
    assert not same_kinds(((x,), {}), ((x, x), {}))
