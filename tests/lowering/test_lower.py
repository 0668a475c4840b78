"""Lowering leaves out what changes nothing, and only that."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moeca_compile.lowering.lower import lower, trace
from moeca_compile.torch_compat import new_fake_mode

NOTHING: dict[str, Callable[[Tensor], Tensor]] = {
    "dtype": lambda x: x.to(torch.float32),
    "order": lambda x: x.permute(0, 1),
    "reshape": lambda x: x.reshape(4, 4),
    "view": lambda x: x.view(4, 4),
    "narrow": lambda x: x.narrow(0, 0, 4),
}
SOMETHING: dict[str, Callable[[Tensor], Tensor]] = {
    "dtype": lambda x: x.to(torch.float64),
    "copy": lambda x: x.to(torch.float32, copy=True),
    "turned": lambda x: x.permute(1, 0),  # of the same shape
    "turned back": lambda x: x.t().reshape(4, 4),  # a copy in other memory order
    "flat": lambda x: x.reshape(16),
    "part": lambda x: x.narrow(0, 1, 3),
}


CONSTANT = torch.arange(16.0).reshape(4, 4)
SOMETHING["constant"] = lambda x: x + CONSTANT.to(torch.float32)


def lowered(function: Callable[[Tensor], Tensor]) -> tuple[list[str], Tensor, Tensor]:
    """Ops of `function` with arithmetic around it, what that gives, and what it is to give."""

    def whole(x: Tensor) -> Tensor:
        return function(x + 1) * 2

    mode = new_fake_mode()
    with mode:
        given = torch.empty(4, 4)
    gm = lower(trace(whole, [given], mode), mode)
    ops = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]
    x = torch.arange(16.0).reshape(4, 4)
    return ops, gm(x), whole(x)


@pytest.mark.parametrize("name", NOTHING)
def test_what_changes_nothing_goes(name: str) -> None:
    ops, found, expected = lowered(NOTHING[name])
    assert ops == ["aten.add.Tensor", "aten.mul.Tensor"]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", SOMETHING)
def test_what_changes_something_stays(name: str) -> None:
    ops, found, expected = lowered(SOMETHING[name])
    assert len(ops) > 2
    assert torch.equal(found, expected)
