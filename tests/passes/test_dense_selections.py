"""Rows picked by a mask are computed on all rows where that is the same, else left alone."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aten_graphs import TracedGraph, traced
from moeca_compile.passes.dense_selections import DenseSelections
from moeca_compile.passes.verify import verify

aten = torch.ops.aten
TOKENS, DIM = 12, 8


def route(x: Tensor, mask: Tensor) -> Tensor:
    at = torch.where(mask)[0]
    out = torch.zeros(TOKENS, 2)
    best, chosen = F.normalize(x[at], dim=1).softmax(-1).topk(2, dim=-1)
    out[at] = best + chosen
    return out * 2


def constants(x: Tensor, mask: Tensor) -> Tensor:
    out = x.clone()
    at = torch.where(mask)[0]
    out[at, 0] = 1.0
    out[at] = out[at] * torch.arange(DIM)
    return out


def filled(x: Tensor, mask: Tensor) -> Tensor:
    at = torch.where(mask)[0]
    out = (x * 2).index_fill(0, at, 0.5)
    return out.index_fill(0, at, x.mean()) + out


def by_nonzero(x: Tensor, mask: Tensor) -> Tensor:
    at = mask.nonzero().squeeze(-1)
    return x.index_put((at,), x.index_select(0, at) ** 2)


def two_masks(x: Tensor, mask: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for chosen in (mask, ~mask):
        at = torch.where(chosen)[0]
        out[at] = (x[at] * 2).softmax(-1)
    return out


def graph_of(function: Callable[..., Tensor], mask: Tensor) -> TracedGraph:
    x = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(1))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        return traced(function, x, mask)


def masks() -> list[Tensor]:
    numbers = torch.arange(TOKENS)
    return [numbers % 3 == 0, numbers < 0, numbers >= 0, numbers == 4]


@pytest.mark.parametrize("function", [route, constants, filled, by_nonzero, two_masks])
def test_same_values_and_no_size_left_open(function: Callable[..., Tensor]) -> None:
    graph = graph_of(function, masks()[0])
    report = DenseSelections().run(graph.gm)
    verify(graph.gm, report.name)
    assert report.changed == (2 if function is two_masks else 1)
    assert report.missed == ()
    assert not graph.targets[aten.sym_size.int] and not graph.targets[aten._assert_scalar.default]
    put = (aten.index_put.default, aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
    assert not any(graph.targets[target] for target in put)
    at = [v.dtype for v in graph.values].index(torch.bool)
    for mask in masks():
        graph.values[at] = mask
        torch.testing.assert_close(graph.run(), function(graph.values[1 - at], mask))


def test_second_run_changes_nothing() -> None:
    graph = graph_of(route, masks()[0])
    DenseSelections().run(graph.gm)
    text = graph.text()
    again = DenseSelections().run(graph.gm)
    assert (again.changed, again.missed, graph.text()) == (0, (), text)


def mixing(x: Tensor, mask: Tensor) -> Tensor:
    at = torch.where(mask)[0]
    return x.index_put((at,), x[at] - x[at].mean(0))


def counted(x: Tensor, mask: Tensor) -> Tensor:
    at = torch.where(mask)[0]
    return x.index_put((at,), x[at] / at.shape[0])


def not_put_back(x: Tensor, mask: Tensor) -> Tensor:
    return x[torch.where(mask)[0]].sum(0)


def used_elsewhere(x: Tensor, mask: Tensor) -> Tensor:
    at = torch.where(mask)[0]
    rows = x[at] * 2
    return x.index_put((at,), rows) + rows.sum(0)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (mixing, "no function of single rows"),
        (counted, "number is used in aten.div"),
        (not_put_back, "not put back"),
        (used_elsewhere, "used elsewhere"),
    ],
)
def test_refused_with_a_reason_and_unchanged(function: Callable[..., Tensor], reason: str) -> None:
    graph = graph_of(function, masks()[0])
    text = graph.text()
    report = DenseSelections().run(graph.gm)
    assert report.changed == 0
    (missed,) = report.missed
    assert re.search(reason, missed.reason)
    assert missed.node in graph.gm.graph.nodes
    assert graph.text() == text
