"""The `moeca::` ops: schema, fake implementation and semantics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import moeca_compile.ops  # noqa: F401
from graph.pushing import tensor
from moeca_compile.torch_compat import new_fake_mode

moeca = torch.ops.moeca
# Autograd is not asked of ops that only run in inference.
CHECKS = ("test_schema", "test_faketensor")
IDS = torch.tensor([[0, 2], [1, 0], [2, 1]])
SCORES = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.5, 0.5]])
GUARD: tuple[Any, ...] = (
    IDS, SCORES, IDS.flip(1), SCORES.flip(1), SCORES + 1, SCORES, torch.ones(3), 1,
)  # fmt: skip


def f32(*shape: int, seed: int = 0) -> Tensor:
    return tensor(*shape, seed=seed, dtype=torch.float32)


CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "expert_rows": (moeca.expert_rows, (f32(4, 3), 1)),
    "expert_rows, strided": (moeca.expert_rows, (f32(3, 4).t(), 1)),
    "select_experts": (moeca.select_experts, (IDS, [f32(3, 4, seed=i) for i in range(3)])),
    "select_experts, int32": (
        moeca.select_experts,
        (IDS.int(), [f32(3, 4, seed=i).bfloat16() for i in range(3)]),
    ),
    "grouped_linear, listed": (
        moeca.grouped_linear,
        (f32(5, 3), torch.tensor([2, 2, 4]), [f32(2, 3, seed=i) for i in range(3)], []),
    ),
    "grouped_linear, stacked": (
        moeca.grouped_linear,
        (f32(5, 3), torch.tensor([2, 2, 4]), [f32(3, 2, 3)], [f32(3, 2)]),
    ),
    "cache_read": (moeca.cache_read, (f32(5, 3), 4)),
    "cache_write": (moeca.cache_write, (f32(5, 3), torch.tensor([0, 4]), f32(2, 3))),
    "cache_fill": (moeca.cache_fill, (f32(5, 3), f32(4, 3))),
    "cache_fill, cast": (moeca.cache_fill, (f32(5, 3), f32(4, 3).bfloat16())),
    "expert_thresholds": (moeca.expert_thresholds, (f32(3, 3).abs(), IDS, 0.8, 0.6, 0.65)),
    "guard_branches, threshold": (moeca.guard_branches, (*GUARD, None, "moeca", 1.0, 0.6)),
    "guard_branches, budget": (moeca.guard_branches, (*GUARD, 2, "input_drift", 1.0, 0.6)),
}


@pytest.mark.parametrize("name", CALLS)
def test_schema_and_fake_implementation(name: str) -> None:
    op, args = CALLS[name]
    torch.library.opcheck(op.default, args, test_utils=CHECKS)


@pytest.mark.parametrize("name", CALLS)
def test_fake_results_have_the_real_strides(name: str) -> None:
    op, args = CALLS[name]
    with new_fake_mode() as mode:
        faked = tree_map_only(Tensor, mode.from_tensor, args)
        fakes = tree_leaves(op(*faked))
    reals = tree_leaves(op(*args))
    for real, fake in zip(reals, fakes, strict=True):
        if isinstance(real, Tensor):
            assert real.shape == fake.shape
            assert real.stride() == fake.stride()
            assert real.dtype == fake.dtype


def test_select_experts_takes_the_chosen_row() -> None:
    outs = [f32(3, 4, seed=i) for i in range(3)]
    got = moeca.select_experts(IDS, outs)
    for token, row in enumerate(IDS.tolist()):
        for slot, expert in enumerate(row):
            assert torch.equal(got[token, slot], outs[expert][token])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_grouped_linear(stacked: bool, bias: bool, dtype: torch.dtype) -> None:
    """Expert 1 has no rows, the last two rows are padding."""
    rows = tensor(7, 3, dtype=dtype)
    weights, biases = tensor(3, 2, 3, dtype=dtype), tensor(3, 2, seed=1, dtype=dtype)
    ends = torch.tensor([2, 2, 5])
    given = [weights] if stacked else list(weights)
    shift = ([biases] if stacked else list(biases)) if bias else []
    got = moeca.grouped_linear(rows, ends, given, shift)
    assert got.dtype == dtype
    for row, expert in enumerate([0, 0, 2, 2, 2]):
        want = F.linear(rows[row], weights[expert], biases[expert] if bias else None)
        torch.testing.assert_close(got[row], want)
    assert torch.equal(got[5:], torch.zeros_like(got[5:]))


def test_no_rows_at_all() -> None:
    got = moeca.grouped_linear(f32(0, 3), torch.tensor([0, 0]), [f32(2, 2, 3)], [])
    assert got.shape == (0, 2)


def test_a_write_changes_its_rows_only() -> None:
    cache = torch.zeros(4, 2)
    moeca.cache_write(cache, torch.tensor([2, 0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert cache.tolist() == [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]
    moeca.cache_fill(cache, torch.ones(3, 2))
    assert cache.tolist() == [[1.0, 1.0]] * 3 + [[0.0, 0.0]]
    assert moeca.cache_read(cache, 3).tolist() == [[1.0, 1.0]] * 3
