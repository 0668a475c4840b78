"""An expert's body as a program: which bodies have one, and that running it is running the body."""

from __future__ import annotations

import pytest
import torch

import moeca_compile.ops  # noqa: F401
from graph.pushing import tensor
from graph.test_experts import BODIES, EXPERTS, IDS, SLOTS, TOKENS, WIDTH, make_body, parameters
from graph.test_experts import by_loop as by_loop_over_rows
from moeca_compile.graph.expert_program import expert_program
from moeca_compile.graph.experts import sort_branches
from moeca_compile.lowering.expert_programs import program_flops

moeca = torch.ops.moeca
WITHOUT = {"normed", "fused norms", "split weights", "scaled weight"}


@pytest.mark.parametrize("name", BODIES)
def test_chains_of_products_and_elementwise_ops_have_a_program(name: str) -> None:
    expert, rows, shapes = BODIES[name]
    assert (expert_program(make_body(expert, rows, shapes), rows) is None) == (name in WITHOUT)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(BODIES.keys() - WITHOUT))
def test_the_program_is_the_expert(name: str, dtype: torch.dtype, stacked: bool) -> None:
    """Expert 2 has no rows. Tolerance: rounding of products over at most 8 values."""
    expert, inputs, shapes = BODIES[name]
    program = expert_program(make_body(expert, inputs, shapes), inputs)
    rows = [tensor(TOKENS, WIDTH, seed=5 + i, dtype=dtype) for i in range(inputs)]
    params = parameters(shapes, dtype)
    order, groups = sort_branches(IDS.reshape(-1), EXPERTS)
    given = [torch.stack(p) for p in params] if stacked else [t for p in params for t in p]
    counts = [1 if stacked else EXPERTS] * len(params)
    token = torch.div(order, SLOTS, rounding_mode="floor")
    got = moeca.grouped_experts(rows, token, groups.ends, given, counts, program, WIDTH)
    want = by_loop_over_rows(expert, IDS, rows, params).reshape(-1, WIDTH)[order]
    tolerance = 1e-5 if dtype is torch.float32 else 5e-2
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_rows_past_the_end_are_padding() -> None:
    expert, inputs, shapes = BODIES["mlp"]
    program = expert_program(make_body(expert, inputs, shapes), inputs)
    params = parameters(shapes, torch.float32)
    got = moeca.grouped_experts(
        [tensor(TOKENS, WIDTH, dtype=torch.float32)],
        torch.tensor([0, 1, 2]),
        torch.tensor([0, 1, 1, 1]),
        [t for p in params for t in p],
        [EXPERTS] * len(params),
        program,
        WIDTH,
    )
    assert got[0].abs().sum() > 0
    assert torch.equal(got[1:], torch.zeros(2, WIDTH))


def test_flops_are_those_of_the_products() -> None:
    expert, inputs, shapes = BODIES["packed swiglu"]
    program = expert_program(make_body(expert, inputs, shapes), inputs)
    assert program is not None
    sizes = [torch.Size(s).numel() for s in shapes]
    assert program_flops(program, 10, inputs, shapes) == 2 * 10 * sum(sizes)


def test_a_body_that_mixes_rows_has_none() -> None:
    def centred(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x - x.mean(0), w)

    assert expert_program(make_body(centred, 1, [(WIDTH, WIDTH)]), 1) is None
