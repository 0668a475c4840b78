"""Experts that are slices of stacked parameters, called in loops that Dynamo cannot trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capture.harness import assert_equal, capturing, op_counts, reference, run_steps
from capture.models import DIM, EXPERTS, SLOTS, inputs, make
from moeca_compile.capture import compiling_for_moeca, install, prepare
from moeca_compile.capture.stacked import may_dispatch, stacked_parameters

HIDDEN = 24


class Stacked(nn.Module):
    """Fused gate and up projection, SiLU, down projection; the loop is its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(EXPERTS, 2 * HIDDEN, DIM))
        self.down = nn.Parameter(torch.empty(EXPERTS, DIM, HIDDEN))

    def one(self, rows: Tensor, number: Any) -> Tensor:
        gate, up = F.linear(rows, self.up[number]).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down[number])

    def forward(self, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(rows)
        mask = F.one_hot(index, num_classes=EXPERTS).permute(2, 1, 0)
        for hit in (mask.sum(dim=(-1, -2)) > 0).nonzero():
            slot, token = torch.where(mask[hit[0]])
            out = self.one(rows[token], hit[0]) * weights[token, slot, None]
            total.index_add_(0, token, out.to(total.dtype))
        return total


class Biased(Stacked):
    """Weights [E, in, out], biases, every other column a gate, a limit, a scale of each expert."""

    limit = 7.0

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(EXPERTS, DIM, 2 * HIDDEN))
        self.up_bias = nn.Parameter(torch.empty(EXPERTS, 2 * HIDDEN))
        self.down = nn.Parameter(torch.empty(EXPERTS, HIDDEN, DIM))
        self.scale = nn.Parameter(torch.empty(EXPERTS))
        self.offset = nn.Parameter(torch.empty(DIM))

    def one(self, rows: Tensor, number: Any) -> Tensor:
        both = rows @ self.up[number] + self.up_bias[number]
        gate, up = both[..., ::2].clamp(max=self.limit), both[..., 1::2]
        hidden = (1 + up) * gate.sigmoid().mul_(0.5)
        return hidden @ self.down[number] * self.scale[number] + self.offset


class Upcast(Stacked):
    """Activation in float32, result in the dtype of the rows."""

    def one(self, rows: Tensor, number: Any) -> Tensor:
        gate, up = F.linear(rows, self.up[number]).float().chunk(2, -1)
        return F.linear((F.silu(gate) * up).to(rows.dtype), self.down[number])


class Numbered(Stacked):
    """An expert that is more than its slices: its number enters. Must be refused."""

    def one(self, rows: Tensor, number: Any) -> Tensor:
        return super().one(rows, number) * (1 + int(number))


class Mixing(Stacked):
    """An expert whose rows see each other. Must be refused."""

    def one(self, rows: Tensor, number: Any) -> Tensor:
        return super().one(rows - rows.mean(0, keepdim=True), number)


class Dropping(Stacked):
    """Rows over a capacity are dropped. Must be refused."""

    def forward(self, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(rows)
        for number in range(EXPERTS):
            token, slot = (index == number).nonzero(as_tuple=True)
            token, slot = token[:14], slot[:14]
            out = self.one(rows[token], number) * weights[token, slot, None]
            total.index_add_(0, token, out)
        return total


class Layer(nn.Module):
    """Router around a stacked module, as the libraries write it."""

    bank: type[Stacked] = Stacked

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, EXPERTS, bias=False)
        self.experts = self.bank()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        weights, index = self.gate(flat).softmax(-1).topk(SLOTS, -1)
        return self.experts(flat, index, weights).view(x.shape)


class Written(Layer):
    """Router and loop in one function, parts split by sizes read on the host."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        weights, index = self.gate(flat).softmax(-1).topk(SLOTS, -1)
        branch = index.reshape(-1)
        order = branch.argsort()
        sizes = torch.bincount(branch, minlength=EXPERTS).tolist()
        parts = flat.index_select(0, order // SLOTS).split(sizes)
        outs = [self.experts.one(part, number) for number, part in enumerate(parts)]
        out = torch.cat(outs).index_select(0, order.argsort()).view(-1, SLOTS, DIM)
        return (out * weights.unsqueeze(-1)).sum(1).view(x.shape)


def layer_of(bank_class: type[Stacked]) -> type[Layer]:
    return type(f"{bank_class.__name__}Layer", (Layer,), {"bank": bank_class})


@pytest.mark.parametrize(
    ("layer", "mechanism"),
    [
        (Layer, "method"),
        (layer_of(Biased), "method"),
        (Written, "statements"),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_stacked_experts_become_one_graph(layer: type[Layer], mechanism: str) -> None:
    model = make(layer, layers=1)
    steps = [inputs(0), inputs(1)]
    expected = reference(model, steps)
    report = prepare(model, *steps[0])
    assert report.installed == 1, str(report)
    assert {m.mechanism for m in report.modules} == {mechanism}
    assert {m.num_experts for m in report.modules} == {EXPERTS}
    counter, backend = capturing()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    outputs, added = run_steps(compiled, counter, steps)
    assert added == [1, 0]
    assert_equal(outputs, expected)
    assert op_counts(counter.graphs[0])["select_experts"] == 1


def test_plain_torch_compile_is_whole_from_the_second_call_on() -> None:
    model = make(Layer, layers=1)
    steps = [inputs(step) for step in range(3)]
    expected = reference(model, steps)
    counter, backend = capturing()
    outputs, added = run_steps(torch.compile(model, backend=backend), counter, steps)
    assert added == [1, 1, 0]
    assert_equal(outputs, expected)


@pytest.mark.parametrize(
    ("bank_class", "reason"),
    [
        (Numbered, "no selection or weighted sum"),
        (Mixing, "no selection or weighted sum"),
        (Dropping, "everything on one expert gives other values"),
    ],
)  # fmt: skip
def test_what_is_more_than_its_slices_is_refused(bank_class: type[Stacked], reason: str) -> None:
    model = make(layer_of(bank_class), layers=1)
    report = install(model, inputs(), {}, is_active=compiling_for_moeca)
    assert report.installed == 0
    assert any(reason in m.reason or "local equals" in m.reason for m in report.modules), report


def test_low_precision_keeps_its_own_casts() -> None:
    """The body is checked in float32 and learned again in bfloat16, where casts are."""
    model = make(layer_of(Upcast), layers=1).to(torch.bfloat16)
    args = tuple(value.to(torch.bfloat16) for value in inputs())
    expected = model(*args)
    assert prepare(model, *args).installed == 1
    counter, backend = capturing()
    found = torch.compile(model, backend=backend, fullgraph=True)(*args)
    assert len(counter) == 1
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
    text = counter.graphs[0].print_readable(print_output=False)
    assert text.count(".float()") >= EXPERTS and text.count("torch.bfloat16)") >= EXPERTS


def test_equal_slices_are_told_apart() -> None:
    """Freshly built experts may be equal: any routing would pass."""
    model = make(Layer, layers=1)
    with torch.no_grad():
        for parameter in model.layers[0].moe.experts.parameters():
            parameter.copy_(parameter[:1].clone().expand_as(parameter))
    report = prepare(model, *inputs())
    assert report.installed == 1
    with torch.no_grad():
        model.layers[0].moe.experts.down[1:].mul_(2.0)
    counter, backend = capturing()
    outputs, _ = run_steps(torch.compile(model, backend=backend), counter, [inputs()])
    assert_equal(outputs, reference(model, [inputs()]))


def test_a_changed_setting_is_not_answered_by_the_old_body() -> None:
    """A number that the body has as a constant is compared while tracing."""
    layer = layer_of(Biased)
    model = make(layer, layers=1)
    model.layers[0].moe.experts.limit = 7.0  # on the instance: a setting of the module
    assert prepare(model, *inputs()).installed == 1
    model.layers[0].moe.experts.limit = 0.1
    _, backend = capturing()
    with pytest.raises(Exception, match="has changed: capture again"):
        torch.compile(model, backend=backend, fullgraph=True)(*inputs())


def test_stacks_are_told_from_layers() -> None:
    assert sorted(stacked_parameters(Biased())) == ["down", "scale", "up", "up_bias"]
    assert not may_dispatch(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 8)))
    assert not may_dispatch(nn.MultiheadAttention(16, 2))
