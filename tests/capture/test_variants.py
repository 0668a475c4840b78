"""Layouts, weight forms and Python features that a dispatch may be written with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from capture.harness import assert_equal, capturing, reference, run_steps
from capture.models import DIM, EXPERTS, SLOTS, HitList, Mlp, inputs, make
from moeca_compile.capture import compiling_for_moeca, install
from quick import mostly_slow


def route(gate: nn.Module, flat: Tensor, slots: int = SLOTS) -> tuple[Tensor, Tensor]:
    weights, index = gate(flat).softmax(-1).topk(slots, -1)
    return weights, index


def scatter(bank: nn.ModuleList, rows: Tensor, token: Tensor, picks: Tensor, out: Tensor) -> Tensor:
    for number in picks.unique().tolist():
        here = (picks == number).nonzero()[:, 0]
        out.index_add_(0, token[here], bank[number](rows[token[here]]))
    return out


class SlotMajor(HitList):
    """Branches ordered by slot, then by token."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        weights, index = route(self.gate, flat)
        return self.run(flat, index.t().reshape(-1), weights.t().reshape(-1)).view(x.shape)

    def run(self, flat: Tensor, picks: Tensor, gates: Tensor) -> Tensor:
        token = torch.arange(flat.shape[0], device=flat.device).repeat(SLOTS)
        total = torch.zeros_like(flat)
        for number in picks.unique().tolist():
            here = (picks == number).nonzero()[:, 0]
            total.index_add_(
                0, token[here], self.bank[number](flat[token[here]]) * gates[here, None]
            )
        return total


class DenseWeights(HitList):
    """Weights looked up in a [T, E] matrix inside the loop."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        scores = self.gate(flat).softmax(-1)
        index = scores.topk(SLOTS, -1)[1]
        total = torch.zeros_like(flat)
        for number, expert in enumerate(self.bank):
            token = (index == number).nonzero()[:, 0]
            total.index_add_(0, token, expert(flat[token]) * scores[token, number, None])
        return total.view(x.shape)


class AddsToShared(HitList):
    """Routed outputs are added into the shared expert's output."""

    def __init__(self) -> None:
        super().__init__()
        self.common = Mlp()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        weights, index = route(self.gate, flat)
        total = self.common(flat)
        for number, expert in enumerate(self.bank):
            token, slot = (index == number).nonzero(as_tuple=True)
            total.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return total.view(x.shape)


class Unweighted(HitList):
    """Plain sum of the chosen experts, top 1 and 3."""

    slots = 3

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        index = route(self.gate, flat, self.slots)[1]
        return self.run(x, index)

    def run(self, x: Tensor, index: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        token = torch.arange(flat.shape[0], device=flat.device).repeat_interleave(self.slots)
        return scatter(self.bank, flat, token, index.reshape(-1), torch.zeros_like(flat)).view_as(x)


class TopOne(Unweighted):
    slots = 1


class Dictionary(HitList):
    """Experts in a ModuleDict, numbered by their order."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = nn.ModuleDict({f"expert_{9 - i}": Mlp() for i in range(EXPERTS)})

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        weights, index = route(self.gate, flat)
        total = torch.zeros_like(flat)
        for number, name in enumerate(self.bank):
            token, slot = (index == number).nonzero(as_tuple=True)
            total.index_add_(0, token, self.bank[name](flat[token]) * weights[token, slot, None])
        return total.view(x.shape)


def scaled(factor: float) -> Callable[[type], type]:
    """A class decorator whose forward keeps a variable of this function."""

    def decorate(cls: type) -> type:
        def forward(self: nn.Module, x: Tensor, c: Tensor, *, bias: float = 0.0) -> Tensor:
            flat = x.reshape(-1, DIM)
            weights, index = route(self.gate, flat)
            picks = index.reshape(-1)
            order = picks.argsort()
            counts = torch.bincount(picks, minlength=EXPERTS)
            parts = flat[order // SLOTS].split(counts.tolist())
            out = torch.cat([e(p) for e, p in zip(self.bank, parts)])[order.argsort()]
            out = out.view(*weights.shape, DIM) * weights[..., None]
            return out.sum(1).view(x.shape) * factor + bias

        cls.forward = forward  # type: ignore[attr-defined]
        return cls

    return decorate


@scaled(0.25)
class Closure(HitList):
    pass


class Mangled(HitList):
    """Private names and zero-argument super in the function that is rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.__scale = 0.5

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        assert super().extra_repr() == ""
        flat = x.reshape(-1, DIM)
        weights, index = route(self.gate, flat)
        total = torch.zeros_like(flat)
        with torch.no_grad():
            for number, expert in enumerate(self.bank):
                token, slot = (index == number).nonzero(as_tuple=True)
                total.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return total.view(x.shape) * self.__scale


class InHelper(HitList):
    """The dispatch sits in a plain function that is handed the experts."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        index = route(self.gate, flat)[1]
        token = torch.arange(flat.shape[0], device=flat.device).repeat_interleave(SLOTS)
        total = scatter(self.bank, flat, token, index.reshape(-1), torch.zeros_like(flat))
        return total.view(x.shape)


class Logged(HitList):
    """Counts that the original only computes to store them: they must not be dropped."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        weights, index = route(self.gate, flat)
        self.load = torch.nn.functional.one_hot(index, EXPERTS).sum((0, 1))
        total = torch.zeros_like(flat)
        for number, expert in enumerate(self.bank):
            token, slot = (index == number).nonzero(as_tuple=True)
            total.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return total.view(x.shape)


VARIANTS: list[type[nn.Module]] = [
    SlotMajor, DenseWeights, AddsToShared, Unweighted, TopOne, Dictionary, Closure, Mangled,
    InHelper, Logged,
]  # fmt: skip


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, 3), ids=lambda v: v.__name__)
def test_variant_becomes_one_graph(variant: type[nn.Module]) -> None:
    model = make(variant, layers=2)
    steps = [inputs(0), inputs(1)]
    expected = reference(model, steps)
    report = install(model, steps[0], {}, is_active=compiling_for_moeca)
    assert report.installed == 2, str(report)
    counter, backend = capturing()
    outputs, added = run_steps(
        torch.compile(model, backend=backend, fullgraph=True), counter, steps
    )
    assert added == [1, 0]
    assert_equal(outputs, expected)
    if variant is Logged:
        load = model.layers[0].moe.load
        assert int(load.sum()) == 14 * SLOTS


@pytest.mark.parametrize("variant", [SlotMajor, Unweighted, TopOne], ids=lambda v: v.__name__)
def test_slots_per_token_are_found(variant: type[nn.Module]) -> None:
    slots = getattr(variant, "slots", SLOTS)
    report = install(make(variant, 1), inputs(), {}, is_active=compiling_for_moeca)
    assert report.modules[0].reason == f"reproduced with {slots} slots per token"
