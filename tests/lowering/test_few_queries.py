"""Attention of few queries is what torch computes, wherever it is computed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

from graph_runs import use_graph_level
from lowered import reuse_step
from moeca_compile.lowering import few_queries

moeca = torch.ops.moeca
sdpa = F.scaled_dot_product_attention
here = pytest.mark.skipif(
    not few_queries.dtypes(), reason="the kernel is for AMD's processors with AVX-512"
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(params=sorted(few_queries.dtypes(), key=str), ids=str)
def kernel_dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def states(queries: int, keys: int, width: int, wide: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v of two samples and three heads, in memory [B, L, H, D] as projections leave them."""
    sizes = [(queries, width), (keys, width), (keys, wide)]
    made = [values(2, n, 3, w, seed=i, dtype=dtype) for i, (n, w) in enumerate(sizes)]
    return [t.transpose(1, 2) for t in made]


@pytest.mark.parametrize("queries", [0, 1, 2, 3, 5, 70])
@pytest.mark.parametrize("keys", [1, 16, 100])
@pytest.mark.parametrize(("width", "wide"), [(64, 64), (2, 3), (24, 40), (70, 100)])
def test_every_size(
    kernel_dtype: torch.dtype, queries: int, keys: int, width: int, wide: int, threads: int
) -> None:
    q, k, v = states(queries, keys, width, wide, kernel_dtype)
    out = few_queries.attention(q, k, v, None)
    assert out is not None and out.dtype == kernel_dtype
    assert out.transpose(1, 2).is_contiguous()
    within = TOLERANCE[kernel_dtype]
    want = sdpa(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), want, rtol=within, atol=within)


def test_a_query_does_not_depend_on_the_others(kernel_dtype: torch.dtype) -> None:
    q, k, v = states(41, 70, 24, 40, kernel_dtype)
    whole = few_queries.attention(q, k, v, None)
    assert whole is not None
    for count in (1, 2, 3, 5, 6, 33):
        for start in (0, 41 - count):
            some = few_queries.attention(q[:, :, start : start + count], k, v, None)
            assert some is not None and torch.equal(some, whole[:, :, start : start + count])


@pytest.mark.parametrize("scale", [0.0, 1.5, -0.3])
def test_scale(kernel_dtype: torch.dtype, scale: float) -> None:
    q, k, v = states(6, 30, 16, 16, kernel_dtype)
    out = few_queries.attention(q, k, v, scale)
    within, want = TOLERANCE[kernel_dtype], sdpa(q.double(), k.double(), v.double(), scale=scale)
    assert out is not None
    torch.testing.assert_close(out.double(), want, rtol=within, atol=within)


def test_scores_far_apart_and_what_is_not_finite(kernel_dtype: torch.dtype) -> None:
    q, k, v = states(5, 30, 16, 16, kernel_dtype)
    q[:, :, 0] *= 200  # one weight is 1, the others vanish
    q[0, 0, 1, 3], q[0, 0, 2, 3] = math.nan, math.inf
    out = few_queries.attention(q, k, v, None)
    assert out is not None
    want = sdpa(q.double(), k.double(), v.double())
    within = TOLERANCE[kernel_dtype]
    torch.testing.assert_close(out.double(), want, rtol=within, atol=within, equal_nan=True)
    assert out[0, 0, 1:3].isnan().all() and out[0, 0, 3:].isfinite().all()


def test_states_of_bfloat16_are_read_by_twos(kernel_dtype: torch.dtype) -> None:
    """An odd width, and rows an odd number of elements apart, are left to torch."""
    odd = states(5, 9, 7, 7, kernel_dtype)
    longer = [values(2, 3, 9, 9, seed=i, dtype=kernel_dtype)[..., :8] for i in range(3)]
    for q, k, v in (odd, longer):
        out = few_queries.attention(q, k, v, None)
        assert (out is None) == (kernel_dtype == torch.bfloat16)
        if out is not None:
            torch.testing.assert_close(out, sdpa(q, k, v), rtol=1e-5, atol=1e-5)


REFUSED: dict[str, dict[str, Any]] = {
    "another dtype": {name: values(2, 3, 9, 8).double() for name in "qkv"},
    "two dtypes": {"v": values(2, 3, 9, 8).bfloat16()},
    "columns apart": {"q": values(2, 3, 9, 16)[..., ::2]},
    "fewer heads of keys": {"k": values(2, 1, 9, 8), "v": values(2, 1, 9, 8)},
    "one sample of keys": {"k": values(1, 3, 9, 8), "v": values(1, 3, 9, 8)},
    "three dims": {name: values(3, 9, 8) for name in "qkv"},
    "no keys": {name: values(2, 3, 0, 8) for name in "kv"},
    "many keys": {name: values(2, 3, 2049, 8) for name in "kv"},
}


@pytest.mark.parametrize("changed", REFUSED.values(), ids=REFUSED)
def test_others_are_left_to_torch(changed: dict[str, Any]) -> None:
    given = {name: values(2, 3, 9, 8, seed=i) for i, name in enumerate("qkv")} | changed
    assert few_queries.attention(given["q"], given["k"], given["v"], None) is None


def test_the_op_is_torchs_attention_where_the_kernel_is_not_for_it() -> None:
    q, k, v = (values(2, 3, 9, 8, seed=i).double() for i in range(3))
    out = moeca.few_queries_attention(q, k, v, 0.3)
    torch.testing.assert_close(out, sdpa(q, k, v, scale=0.3))
    assert out.transpose(1, 2).is_contiguous()
    with pytest.raises(RuntimeError):
        moeca.few_queries_attention(q, k, v.float(), None)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_op(dtype: torch.dtype, scale: float | None) -> None:
    given = states(7, 20, 8, 12, dtype)
    torch.library.opcheck(moeca.few_queries_attention.default, (*given, scale))


@here
def test_which_calls_are_its_own() -> None:
    """Selected queries, nothing beyond a scale."""
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        count = mode.shape_env.create_unbacked_symint()  # type: ignore[union-attr]
        some, all_of = torch.empty(2, 3, count, 8), torch.empty(2, 3, 9, 8)
        mask = torch.empty(2, 3, count, 9)
    assert few_queries.pays(some, all_of, all_of)
    assert few_queries.pays(some, all_of, all_of, None, 0.0, False, scale=0.5)
    assert not few_queries.pays(all_of, all_of, all_of)
    assert not few_queries.pays(some, all_of, all_of, mask)
    assert not few_queries.pays(some, all_of, all_of, attn_mask=mask)
    assert not few_queries.pays(some, all_of, all_of, None, 0.1)
    assert not few_queries.pays(some, all_of, all_of, None, 0.0, True)
    assert not few_queries.pays(some, all_of, all_of, enable_gqa=True)
    assert not few_queries.pays(some, some, some)


@here
def test_lowering_puts_it_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a reuse step, not in a refresh, and with the values of torch's attention."""
    use_graph_level(monkeypatch)
    outs = []
    for keys in (few_queries.KEYS, 0):
        monkeypatch.setattr(few_queries, "KEYS", keys)
        out, found = reuse_step()
        outs.append(out)
        op = moeca.few_queries_attention.default
        assert found["reuse"].count(op) == bool(keys)
        assert op not in found["refresh"]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)
