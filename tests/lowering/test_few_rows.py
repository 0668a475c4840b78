"""The kernel for products of few rows computes what torch's products do, or stands aside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

from graph_runs import use_graph_level
from lowered import reuse_step
from moeca_compile.lowering import few_rows

moeca = torch.ops.moeca
here = pytest.mark.skipif(
    not few_rows.suits(torch.empty(1)), reason="the kernels are for x86 with AVX2, see native.py"
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inputs", [1, 7, 32, 100, 1024])
@pytest.mark.parametrize("outputs", [1, 3, 4, 64, 83, 384])
def test_every_size(
    kernel_dtype: torch.dtype, inputs: int, outputs: int, bias: bool, threads: int
) -> None:
    """Groups of no row, one to thirteen (every tile there is), more than a block of them, and as
    many as weights are packed for."""
    counts = [0, 1, 2, 0, 3, 4, 5, 6, 7, 8, 9, 13, 27, 165, 0]
    ends = torch.tensor(counts).cumsum(0)
    rows = values(int(ends[-1]) + 2, inputs, dtype=kernel_dtype)  # two of padding
    weights = (values(len(counts), outputs, inputs, seed=1) / inputs**0.5).to(kernel_dtype)
    biases = values(len(counts), outputs, seed=2, dtype=kernel_dtype)
    out = torch.full((len(rows), outputs), torch.nan, dtype=kernel_dtype)
    shifts = list(biases) if bias else []
    assert few_rows.products(rows, ends, list(weights), shifts, out)
    group = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    want = torch.einsum("ri,roi->ro", rows[:-2].double(), weights[group].double())
    want += biases[group] if bias else 0
    within = TOLERANCE[kernel_dtype]
    torch.testing.assert_close(out[:-2].double(), want, rtol=within, atol=within)
    assert out[-2:].isnan().all()  # nobody's rows


turned_too = pytest.mark.skipif(
    not few_rows._takes_turned(torch.empty(1)), reason="that kernel is for AMD's with AVX-512"
)


@turned_too
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inputs", [1, 7, 300])
@pytest.mark.parametrize("outputs", [1, 15, 16, 64, 83, 256])
def test_weights_that_are_stored_turned_around(
    inputs: int, outputs: int, bias: bool, threads: int
) -> None:
    """[I, O] in memory, a part of more outputs; every tile there is, and more than one of them; a
    row's bits do not depend on the others."""
    counts = [0, 1, 2, 3, 0, 4, 5, 6, 7, 20, 0]
    ends = torch.tensor(counts).cumsum(0)
    rows = values(int(ends[-1]) + 2, inputs)
    stored = (values(len(counts), inputs, outputs + 3, seed=1) / inputs**0.5)[..., 1 : outputs + 1]
    weights = [w.t() for w in stored]
    biases = list(values(len(counts), outputs, seed=2)) if bias else []
    out = torch.full((len(rows), outputs), torch.nan)
    assert few_rows.products(rows, ends, weights, biases, out)
    group = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    want = torch.einsum("ri,rio->ro", rows[:-2].double(), stored[group].double())
    want += torch.stack(biases)[group] if bias else 0
    torch.testing.assert_close(out[:-2].double(), want, rtol=1e-5, atol=1e-5)
    assert out[-2:].isnan().all()
    last = len(rows) - 3  # of twenty rows with the same weights
    alone = torch.empty(1, outputs)
    which = [weights[9]], biases[9:10]
    assert few_rows.products(rows[last : last + 1], torch.tensor([1]), *which, alone)
    assert torch.equal(alone[0], out[last])


@here
@pytest.mark.parametrize("turned", [False, pytest.param(True, marks=turned_too)])
@pytest.mark.parametrize("count", [4, 64])
def test_long_rows_keep_their_digits(count: int, turned: bool) -> None:
    """Thousands of products in one chain of additions would lose twice as many as torch does."""
    rows, weight = values(count, 4608), values(128, 4608, seed=1) / 4608**0.5
    want = rows.double() @ weight.double().t()
    out = torch.empty(count, 128)
    weights = [weight.t().contiguous().t() if turned else weight]
    assert few_rows.products(rows, torch.tensor([count]), weights, [], out)
    found, torchs = ((y - want).square().mean().sqrt() for y in (out, rows @ weight.t()))
    assert found < 2 * torchs


def test_a_row_does_not_depend_on_the_others(kernel_dtype: torch.dtype) -> None:
    """The same bits whatever the tile a row is in, and whoever computes it."""
    rows, weight = values(23, 50, dtype=kernel_dtype), values(29, 50, seed=1, dtype=kernel_dtype)
    whole = torch.empty(23, 29, dtype=kernel_dtype)
    assert few_rows.products(rows, torch.tensor([23]), [weight], [], whole)
    for count in range(1, 13):
        for start in (0, 23 - count):
            some, which = torch.empty(count, 29, dtype=kernel_dtype), slice(start, start + count)
            assert few_rows.products(rows[which], torch.tensor([count]), [weight], [], some)
            assert torch.equal(some, whole[which])


def test_rows_and_weights_may_be_parts_of_larger_ones(kernel_dtype: torch.dtype) -> None:
    rows = values(9, 40, dtype=kernel_dtype)[:, 5:21]
    weight = values(12, 64, seed=1, dtype=kernel_dtype)[:, 3:19]
    out, within = torch.empty(9, 12, dtype=kernel_dtype), TOLERANCE[kernel_dtype]
    assert few_rows.products(rows, torch.tensor([9]), [weight], [], out)
    torch.testing.assert_close(out, rows @ weight.t(), rtol=within, atol=within)


def test_parts_that_lie_an_odd_number_apart(kernel_dtype: torch.dtype) -> None:
    """As many rows as weights are packed for, which in bfloat16 goes by two elements."""
    rows = values(165, 1025, dtype=kernel_dtype)[:, 1:]
    weight = (values(64, 1027, seed=1) / 32).to(kernel_dtype)[:, 2:-1]
    out, within = torch.empty(165, 64, dtype=kernel_dtype), TOLERANCE[kernel_dtype]
    assert few_rows.products(rows, torch.tensor([165]), [weight], [], out)
    want = rows.double() @ weight.double().t()
    torch.testing.assert_close(out.double(), want, rtol=within, atol=within)


def test_what_is_not_finite_stays_so_in_its_row(kernel_dtype: torch.dtype) -> None:
    rows, weight = values(5, 20, dtype=kernel_dtype), values(6, 20, seed=1, dtype=kernel_dtype)
    rows[2, 3], rows[4, 19] = torch.inf, torch.nan
    out = torch.empty(5, 6, dtype=kernel_dtype)
    assert few_rows.products(rows, torch.tensor([5]), [weight], [], out)
    assert not out[2].isfinite().any() and out[4].isnan().all()
    assert out[[0, 1, 3]].isfinite().all()


REFUSED: dict[str, dict[str, Any]] = {
    "another dtype": {"rows": values(4, 16).double(), "weight": values(8, 16).double()},
    "columns apart": {"rows": values(4, 32)[:, ::2]},
    "many rows": {"rows": values(2049, 16), "weight": values(17, 16)},
    "columns apart in weights": {"weight": values(8, 32)[:, ::2]},
    "turned, in another dtype": {
        "rows": values(4, 16).bfloat16(),
        "weight": values(16, 8).bfloat16().t(),
    },
    "two dtypes": {"rows": values(4, 16), "weight": values(8, 16).bfloat16()},
}


@pytest.mark.parametrize("changed", REFUSED.values(), ids=REFUSED)
def test_others_are_left_to_torch(changed: dict[str, Any]) -> None:
    given = {"rows": values(4, 16), "weight": values(8, 16, seed=1)} | changed
    rows, weight = given["rows"], given["weight"]
    ends = torch.tensor([len(rows)])
    out = torch.full((len(rows), len(weight)), 7.0, dtype=rows.dtype)
    assert not few_rows.products(rows, ends, [weight], [], out)
    assert (out == 7).all()
    if rows.dtype != weight.dtype:
        with pytest.raises(RuntimeError):
            moeca.few_rows_linear(rows, weight, None)
        return
    torch.testing.assert_close(moeca.few_rows_linear(rows, weight, None), rows @ weight.t())
    torch.testing.assert_close(moeca.grouped_linear(rows, ends, [weight], []), rows @ weight.t())


def test_sizes_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(RuntimeError):
        moeca.few_rows_linear(values(4, 5), values(8, 6), None)
    empty = moeca.few_rows_linear(values(4, 0), values(8, 0), None)
    assert torch.equal(empty, torch.zeros(4, 8))


PAYS: dict[str, tuple[Tensor, Tensor, bool]] = {
    "few rows, large weights": (values(8, 256), values(2048, 256), True),
    "little to multiply": (values(8, 256), values(2047, 256), False),
    "few in many dims": (values(2, 16, 8, 128), values(128, 128), True),
    "many rows": (values(257, 256), values(2048, 256), False),
    "many rows of a router": (values(2048, 256), values(8, 256), True),
    "a few of a router": (values(2047, 256), values(8, 256), False),
    "another dtype": (values(8, 256).double(), values(2048, 256).double(), False),
    "turned weights": (values(8, 256), values(256, 2048).t(), False),
    "no rows, a vector": (values(2048), values(2048, 2048), False),
}


@here
@pytest.mark.parametrize(("rows", "weight", "expected"), PAYS.values(), ids=PAYS)
def test_where_an_op_of_its_own_pays(rows: Tensor, weight: Tensor, expected: bool) -> None:
    assert few_rows.pays(rows, weight) == expected


@here
@pytest.mark.parametrize(("width", "expected"), [(256, True), (255, False)])
def test_selected_rows_are_judged_by_their_weights(width: int, expected: bool) -> None:
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        count = mode.shape_env.create_unbacked_symint()  # type: ignore[union-attr]
        rows, weight = torch.empty(2, count, 256), torch.empty(width, 256)
    assert few_rows.pays(rows, weight) == expected


@here
def test_lowering_puts_it_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of selected rows in a reuse step, none of all rows, and the values of torch's."""
    use_graph_level(monkeypatch)
    outs = []
    for weights in (2**63, 0):
        monkeypatch.setattr(few_rows, "WEIGHTS", weights)
        out, found = reuse_step()
        outs.append(out)
        # qkv, projection, the three of the shared expert; experts go through grouped_linear
        assert found["reuse"].count(moeca.few_rows_linear.default) == (0 if weights else 5)
        assert moeca.few_rows_linear.default not in found["refresh"]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (0, 5), (2, 0, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_of_any_leading_dims(shape: tuple[int, ...], bias: bool) -> None:
    rows, weight, shift = values(*shape), values(7, 5, seed=1), values(7, seed=2) if bias else None
    got = moeca.few_rows_linear(rows, weight, shift)
    torch.testing.assert_close(got, F.linear(rows, weight, shift), rtol=1e-5, atol=1e-5)
    torch.library.opcheck(moeca.few_rows_linear.default, (rows, weight, shift))
