"""Analysis of large models: on fewer samples first, on all of them before anything is accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from capture.models import DIM, Mlp, SplitLoop, inputs, make
from moeca_compile.capture import compiling_for_moeca, install
from moeca_compile.capture.fewer_rows import fewer_rows
from moeca_compile.capture.subject import Replay


def test_cuts_what_shares_the_first_dimension_with_the_rows() -> None:
    freqs = torch.ones(64, 4)
    x, c = torch.arange(8 * 64 * 4.0).view(8, 64, 4), torch.ones(8, 4)
    args, kwargs = fewer_rows(((x, freqs), {"c": c, "flag": True}), 8)
    assert torch.equal(args[0], x[:2]) and args[1] is freqs
    assert torch.equal(kwargs["c"], c[:2]) and kwargs["flag"] is True


def test_keeps_enough_rows_for_every_expert() -> None:
    ((flat,), _) = fewer_rows(((torch.ones(4096, 4),), {}), 64)
    assert len(flat) == 1024


@pytest.mark.parametrize("shape", [(2, 64, 4), (200, 4), (4096,)])
def test_leaves_small_arguments_alone(shape: tuple[int, ...]) -> None:
    assert fewer_rows(((torch.ones(shape),), {}), 8) is None


class ManySamples(SplitLoop):
    """Experts count twice where there are more than four samples."""

    def forward(self, x: Tensor, c: Tensor, record: dict[str, Tensor] | None = None) -> Tensor:
        flat = x.reshape(-1, DIM)
        weight, index = self.gate(flat).softmax(-1).topk(self.k, -1)
        order = index.reshape(-1).argsort()
        counts = index.reshape(-1).bincount(minlength=self.n)
        parts = flat.index_select(0, order // self.k).split(counts.tolist())
        times = 2.0 if x.shape[0] > 4 else 1.0
        out = torch.cat([expert(part) * times for expert, part in zip(self.bank, parts)])
        out = out.index_select(0, order.argsort()).view(-1, self.k, DIM)
        return (out * weight.unsqueeze(-1)).sum(1).view(x.shape)


@pytest.mark.parametrize(
    ("dtype", "last"), [(torch.float32, [8]), (torch.bfloat16, [8, 8])], ids=["float32", "bfloat16"]
)
def test_most_checks_take_few_samples_and_the_last_all(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, last: list[int]
) -> None:
    """In float32 what the original gives for all of them was seen already."""
    samples: list[int] = []
    exact = Replay.exact

    def watched(self: Replay, replacement: Any, arguments: Any = None) -> Any:
        (x, *_), _ = self.arguments if arguments is None else arguments
        samples.append(x.shape[0])
        return exact(self, replacement, arguments)

    monkeypatch.setattr(Replay, "exact", watched)
    model = make(SplitLoop, layers=1).to(dtype)
    call = [v.to(dtype) if v.is_floating_point() else v for v in inputs(batch=8, tokens=64)]
    report = install(model, tuple(call), {}, is_active=compiling_for_moeca)
    assert report.installed == 1
    assert samples[-len(last) :] == last and set(samples[: -len(last)]) == {2}


@pytest.mark.parametrize(("batch", "installed"), [(2, 1), (8, 0)])
def test_what_only_many_samples_do_is_refused(batch: int, installed: int) -> None:
    model = make(ManySamples, layers=1)
    call = inputs(batch=batch, tokens=64)
    report = install(model, call, {}, is_active=compiling_for_moeca)
    assert report.installed == installed


class Mixing(Mlp):
    """What a row becomes depends on which rows come along."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0, keepdim=True))


@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize(
    ("kind", "reason"), [(Mlp, "reproduced"), (Mixing, "no selection or weighted sum")]
)
def test_experts_are_given_rows_that_are_not_for_them(
    kind: type[Mlp], reason: str, batch: int
) -> None:
    """In the trace they get all rows, in a check some: what minds other rows is refused."""
    model = make(SplitLoop, layers=1)
    for module in model.modules():
        if type(module) is Mlp:
            module.__class__ = kind
    report = install(model, inputs(batch=batch, tokens=64), {}, is_active=compiling_for_moeca)
    assert report.installed == (kind is Mlp)
    assert reason in report.modules[0].reason
