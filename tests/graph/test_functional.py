"""In-place ops of user code: replaced where that is right, refused where it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from moeca_compile.graph.functional import Mutation, make_functional
from moeca_compile.torch_compat import new_fake_mode


def traced(function: Callable[..., Tensor], *args: Tensor) -> torch.fx.GraphModule:
    mode = new_fake_mode()
    with mode, torch.no_grad():
        return make_fx(function, pre_dispatch=True)(*(mode.from_tensor(a) for a in args))


def add(x: Tensor, r: Tensor) -> Tensor:
    h = x * 2
    h += r
    return h * 3


def scatter(x: Tensor, r: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out.index_add_(0, torch.tensor([1, 0, 1, 2], device=x.device), r)
    out.mul_(x)
    return out


def view_before(x: Tensor, r: Tensor) -> Tensor:
    h = x * 2
    first = h[:2].reshape(-1) * 2
    h.add_(r)
    return h.reshape(-1)[:6] + first


def through_select(x: Tensor, r: Tensor) -> Tensor:
    h = x * 2
    h[:, 0] = 1.0
    h[1:, 1] *= r[1:, 0]
    h[0, 2:] += 3
    return h * 3


def through_select_and_index(x: Tensor, r: Tensor) -> Tensor:
    h = torch.zeros_like(x)
    h[torch.tensor([1, 2]), 0] = 1.0
    h[torch.tensor([0, 2])] = r[:2]
    return h + x


@pytest.mark.parametrize(
    "function", [add, scatter, view_before, through_select, through_select_and_index]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_values_without_writes(function: Callable, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, r = torch.randn(4, 3, dtype=dtype), torch.randn(4, 3, dtype=dtype)
    gm = traced(function, x, r)
    assert make_functional(gm) >= 1
    gm.recompile()
    assert not any("_." in str(n.target) for n in gm.graph.nodes)
    torch.testing.assert_close(gm(x, r), function(x, r), rtol=0, atol=0)


def test_the_written_dtype_is_kept() -> None:
    def promote(x: Tensor, r: Tensor) -> Tensor:
        h = x * 2
        h.add_(r)
        return h * 3

    x, r = torch.randn(4, 3, dtype=torch.bfloat16), torch.randn(4, 3)
    gm = traced(promote, x, r)
    make_functional(gm)
    gm.recompile()
    assert gm(x, r).dtype == torch.bfloat16
    torch.testing.assert_close(gm(x, r), promote(x, r), rtol=0, atol=0)


def stale_view(x: Tensor, r: Tensor) -> Tensor:
    h = x * 2
    first = h[:2]
    h.add_(r)
    return h[:2] + first


def stale_part(x: Tensor, r: Tensor) -> Tensor:
    h = x * 2
    first = h[:2]
    h[1:, 1] *= r[1:, 0]
    return h[:2] + first


def part_of_input(x: Tensor, r: Tensor) -> Tensor:
    x[:, 0] = 1.0
    return x * r


def through_dropout(x: Tensor, r: Tensor) -> Tensor:
    h = x * 2
    same = torch.nn.functional.dropout(h, 0.1, training=False)
    h.add_(r)
    return same + h


def into_input(x: Tensor, r: Tensor) -> Tensor:
    x.add_(r)
    return x * 2


def test_an_alias_behind_dropout_is_refused_or_followed() -> None:
    """Without training it returns its input, and newer versions of torch trace it as such."""
    x, r = torch.randn(4, 3), torch.randn(4, 3)
    gm = traced(through_dropout, x, r)
    try:
        make_functional(gm)
    except Mutation as error:
        assert "read again" in str(error)
        return
    gm.recompile()
    torch.testing.assert_close(gm(x, r), through_dropout(x, r), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (stale_view, "read again"),
        (into_input, "input of the model"),
        (stale_part, "read again"),
        (part_of_input, "input of the model"),
    ],
)
def test_refused(function: Callable, reason: str) -> None:
    gm = traced(function, torch.randn(4, 3), torch.randn(4, 3))
    with pytest.raises(Mutation, match=reason):
        make_functional(gm)
