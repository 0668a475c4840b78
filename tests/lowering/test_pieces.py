"""What counts as a repeat in a graph, and that its pieces compute what the graph does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from moeca_compile.graph.repeats import find_groups, parts_of_inputs
from moeca_compile.graph.retrace import fake_like
from moeca_compile.lowering.pieces import compile_in_pieces
from moeca_compile.torch_compat import new_fake_mode


def traced(function: Any, *inputs: Tensor) -> GraphModule:
    mode = new_fake_mode()
    with torch.no_grad(), mode:
        fakes = [fake_like(mode, i) for i in inputs]
        return make_fx(function, pre_dispatch=True)(*fakes)


def block(x: Tensor, w: Tensor, scale: float = 2.0) -> Tensor:
    for i in range(8):
        x = torch.tanh(x @ w) * (scale + i) + x
    return x


def weights(count: int) -> list[Tensor]:
    return [torch.randn(4, 4) for _ in range(count)]


def lengths(gm: GraphModule) -> list[tuple[int, int]] | None:
    groups = find_groups(gm.graph)
    return None if groups is None else [(len(g.runs), len(g.runs[0])) for g in groups]


def run_in_pieces(gm: GraphModule, *inputs: Tensor) -> Any:
    pieces = compile_in_pieces(gm, set(), lambda graph, *_: graph)
    assert pieces is not None
    return pieces(*inputs)


def check_four_alike(model: Any, *given: Tensor) -> None:
    gm = traced(model, *given)
    groups = find_groups(gm.graph)
    assert groups is not None and max(len(g.runs) for g in groups) == 4
    assert torch.equal(run_in_pieces(gm, *given)[0], model(*given)[0])


def test_blocks_with_something_around_them() -> None:
    def model(x: Tensor, *w: Tensor) -> tuple[Tensor, int, Tensor]:
        y = x.sin()
        for each in w:
            y = block(y, each)
        return y.cos(), 3, x

    given = [torch.randn(2, 4), *weights(4)]
    gm = traced(model, *given)
    assert lengths(gm) == [(1, 1), (4, 32), (1, 1)]
    found = run_in_pieces(gm, *given)
    assert torch.equal(found[0], model(*given)[0])
    assert found[1] == 3
    assert found[2] is given[0]


def test_two_kinds_of_blocks() -> None:
    def model(x: Tensor, *w: Tensor) -> tuple[Tensor]:
        for each in w[:3]:
            x = block(x, each)
        for each in w[3:]:
            x = block(x, each, scale=3.0).relu()
        return (x,)

    given = [torch.randn(2, 4), *weights(7)]
    gm = traced(model, *given)
    assert lengths(gm) == [(3, 32), (4, 33)]
    assert torch.equal(run_in_pieces(gm, *given)[0], model(*given)[0])


def test_two_blocks_are_left_in_one_graph() -> None:
    def model(x: Tensor, *w: Tensor) -> tuple[Tensor]:
        return (block(block(x, w[0]), w[1]),)

    assert lengths(traced(model, torch.randn(2, 4), *weights(2))) is None


def test_a_constant_that_differs_is_not_a_repeat() -> None:
    def model(x: Tensor, *w: Tensor) -> tuple[Tensor]:
        for number, each in enumerate(w):
            x = block(x, each, scale=number + 0.5)
        return (x,)

    assert lengths(traced(model, torch.randn(2, 4), *weights(4))) is None


def test_other_strides_are_not_a_repeat() -> None:
    def model(x: Tensor, *w: Tensor) -> tuple[Tensor]:
        for each in w:
            x = block(x, each)
        return (x,)

    mixed = [torch.randn(4, 4), torch.randn(4, 4).t(), torch.randn(4, 4), torch.randn(4, 4).t()]
    assert lengths(traced(model, torch.randn(2, 4), *mixed)) is None


def test_a_value_used_twice_here_and_once_there() -> None:
    def model(x: Tensor, *w: Tensor) -> tuple[Tensor]:
        for i in range(3):
            x = block(x, w[i]) + w[3 if i else i]
        return (x,)

    given = [torch.randn(4, 4), *weights(4)]
    gm = traced(model, *given)
    assert lengths(gm) == [(3, 33)]
    assert torch.equal(run_in_pieces(gm, *given)[0], model(*given)[0])


def test_writes_stay_in_order_and_reach_the_inputs() -> None:
    def model(x: Tensor, *given: Tensor) -> tuple[Tensor]:
        for w, kept in zip(given[:4], given[4:], strict=True):
            x = block(x, w) + kept
            kept.copy_(x)
        return (x,)

    given = [torch.randn(2, 4), *weights(4), *(torch.randn(2, 4) for _ in range(4))]
    gm = traced(model, *given)
    expected = [g.clone() for g in given]
    out = model(*expected)
    assert torch.equal(run_in_pieces(gm, *given)[0], out[0])
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def test_a_piece_takes_its_inputs_in_the_graphs_order() -> None:
    """What is written is written back in that order: the older value has to move on first."""

    def model(x: Tensor, *given: Tensor) -> tuple[Tensor]:
        for i in range(3):
            w, older, newer = given[3 * i : 3 * i + 3]
            x = block(x, w) + newer + older  # asked for the other way round
            older.copy_(newer)
            newer.copy_(x)
        return (x,)

    kept = [[*weights(1), torch.randn(2, 4), torch.randn(2, 4)] for _ in range(3)]
    gm = traced(model, torch.randn(2, 4), *(value for each in kept for value in each))
    groups = find_groups(gm.graph)
    assert groups is not None
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    for group in groups:
        for operands in group.operands:
            places = [position[n] for n in operands if n.op == "placeholder"]
            assert places == sorted(places)


def test_written_memory_that_comes_in_twice_is_left_in_one_graph() -> None:
    def model(x: Tensor, kept: Tensor, *w: Tensor) -> tuple[Tensor]:
        half = kept[:2]
        for each in w:
            x = block(x, each) + half
            kept.copy_(kept + 1)
        return (x,)

    assert lengths(traced(model, torch.randn(2, 4), torch.zeros(4, 4), *weights(4))) is None


def test_sizes_from_the_data_do_not_cross_a_border() -> None:
    def model(x: Tensor, *w: Tensor) -> tuple[Tensor]:
        for each in w:
            rows = (x[:, 0] > 0).nonzero().flatten()
            x = block(x, each).index_add(0, rows, x[rows])
        return (x,)

    given = [torch.randn(6, 4), *weights(4)]
    gm = traced(model, *given)
    groups = find_groups(gm.graph)
    assert groups is not None
    assert max(len(g.runs) for g in groups) >= 3
    assert torch.equal(run_in_pieces(gm, *given)[0], model(*given)[0])


def test_a_part_of_an_input_for_each_block() -> None:
    """By another constant in every block, as text encoders' hidden states are."""

    def model(x: Tensor, states: Tensor, *w: Tensor) -> tuple[Tensor]:
        for i, each in enumerate(w):
            x = block(x, each) + states[i] @ each + states[0, :, i : i + 1]
        return (x,)

    check_four_alike(model, torch.randn(2, 4), torch.randn(4, 2, 4), *weights(4))


def test_a_first_block_that_takes_another_layout_is_left_out() -> None:
    """It gets a tensor of its own, the others a part of what the block before returned."""

    def model(x: Tensor, more: Tensor, *w: Tensor) -> tuple[Tensor]:
        for each in w:
            x = torch.cat([block(x, each), more], 1)[:, :4]
        return (x,)

    check_four_alike(model, torch.randn(2, 4), torch.randn(2, 2), *weights(5))


def test_the_same_part_for_all_blocks_stays_in_them() -> None:
    def model(x: Tensor, states: Tensor, *w: Tensor) -> tuple[Tensor]:
        for each in w:
            x = block(x, each) + states[1]
        return (x,)

    gm = traced(model, torch.randn(2, 4), torch.randn(4, 2, 4), *weights(4))
    groups = find_groups(gm.graph)
    assert groups is not None
    (repeated,) = (g for g in groups if len(g.runs) > 1)
    for run in repeated.runs:
        assert torch.ops.aten.select.int in {n.target for n in run}


def test_parts_of_an_input_that_is_written_stay_where_they_are() -> None:
    def model(x: Tensor, states: Tensor, *w: Tensor) -> tuple[Tensor]:
        for i, each in enumerate(w):
            x = block(x, each) + states[i]
            states[i].copy_(x)
        return (x,)

    assert lengths(traced(model, torch.randn(2, 4), torch.zeros(4, 2, 4), *weights(4))) is None


def test_parts_of_inputs_in_a_graph_of_dynamo() -> None:
    """By subscript, where no op has a schema: rows by number are a copy, and what is written to is
    not known where anything is."""
    picked: list[int] = []

    def count(gm: GraphModule, _: Any) -> Any:
        picked.append(len(parts_of_inputs(list(gm.graph.nodes))))
        return gm

    def parts(x: Tensor) -> Tensor:
        return x[0] + x[1, :, :2].sum() + x[..., 1].sum() + x[[0, 2]].sum() + (x > 0)[0]

    def written(x: Tensor) -> Tensor:
        return torch.zeros_like(x[0]).add_(x[1])

    for function in (parts, written):
        torch.compile(function, backend=count)(torch.randn(3, 4, 5))
    assert picked == [3, 0]
