"""Numbers read from tensors: those of no input become numbers, others stay open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from capture.harness import capturing, run_steps
from capture.models import Denoiser, SortedLoop, inputs, make
from moeca_compile.capture import compiling_for_moeca, install, uninstall
from moeca_compile.graph.constant_reads import constants, open_reads, reads_numbers
from moeca_compile.graph.retrace import retrace


def by_sizes(x: Tensor, read: Tensor) -> Tensor:
    """Rows [B, N, D] -> [B, D, h, w], the sizes in a tensor that was made of numbers."""
    sizes = torch.tensor([3, 2]).reshape(-1).unsqueeze(0).repeat(x.shape[0], 1)
    parts = []
    for sample, (h, w) in enumerate(sizes):
        part = x[sample, : h * w].reshape(1, h, w, -1)
        parts.append(part.permute(0, 3, 1, 2))
    return torch.cat(parts)


def by_data(x: Tensor, read: Tensor) -> Tensor:
    """As many rows as an input says."""
    return x[:, : read.sum()] * 2


def graph_of(function: Callable[..., Tensor], *args: Tensor) -> tuple[GraphModule, list[Any]]:
    seen: list[Any] = []

    def keep(gm: GraphModule, values: list[Any]) -> Callable[..., Any]:
        seen.append((gm, values))
        return gm.forward

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        torch.compile(function, backend=keep, fullgraph=True)(*args)
    return seen[0]


def test_sizes_made_of_numbers_become_numbers() -> None:
    x, read = torch.randn(2, 8, 3), torch.tensor([1, 2])
    gm, values = graph_of(by_sizes, x, read)
    assert reads_numbers(gm) and open_reads(gm, values) == []
    assert 6 in [int(v) for n, v in constants(gm, values).items() if n.target == "item"]
    aten = retrace(gm, values)
    shapes = [n.meta["val"].shape for n in aten.gm.graph.nodes if "val" in n.meta]
    assert all(type(size) is int for shape in shapes for size in shape)
    assert not any(
        "assert" in str(n.target) or "scalar" in str(n.target) for n in aten.gm.graph.nodes
    )
    (out,) = aten.gm(*(values[i.position] for i in aten.inputs))
    assert torch.equal(out, by_sizes(x, read))


def test_sizes_of_an_input_stay_open() -> None:
    x, read = torch.randn(2, 8, 3), torch.tensor([1, 2])
    gm, values = graph_of(by_data, x, read)
    assert [n.target for n in open_reads(gm, values)] == ["item"]


class Tail(Denoiser):
    """A denoiser that takes its output apart by sizes in a tensor."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rows = super().forward(x, t)
        return self.cut(rows)

    def cut(self, rows: Tensor) -> Tensor:
        return by_sizes(rows, rows)


class DataTail(Tail):
    """The sizes depend on the input."""

    def cut(self, rows: Tensor) -> Tensor:
        return rows[:, : (rows.argmax() * 0 + 7)]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    """Captured layers rest while there are gradients."""
    with torch.no_grad():
        yield


def model_of(tail: type[Tail]) -> Denoiser:
    model = make(SortedLoop, layers=1)
    model.__class__ = tail
    return model


def test_a_tail_by_constant_sizes_stays_in_the_graph() -> None:
    model, steps = model_of(Tail), [inputs(0), inputs(1)]
    expected = [model(*step) for step in steps]
    report = install(model, steps[0], {}, is_active=compiling_for_moeca)
    assert [(m.mechanism, m.accepted) for m in report.others] == [("flags", True)], str(report)
    counter, backend = capturing()
    outputs, added = run_steps(torch.compile(model, backend=backend), counter, steps)
    assert added == [1, 0]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(outputs, expected, strict=True))
    uninstall(model)
    assert "forward" not in vars(model)


def test_a_tail_by_sizes_of_the_data_stays_outside() -> None:
    model = model_of(DataTail)
    report = install(model, inputs(), {}, is_active=compiling_for_moeca)
    assert report.installed == 1
    assert [(m.mechanism, m.accepted) for m in report.others] == [("none", False)]
    assert "depends on an input" in report.others[0].reason
    counter, backend = capturing()
    found, added = run_steps(torch.compile(model, backend=backend), counter, [inputs(), inputs(1)])
    assert added == [1, 0]  # up to the read; the slice behind it is one call and no graph
    assert torch.allclose(found[1], model(*inputs(1)), atol=1e-5)
