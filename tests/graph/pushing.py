"""Harness: trace a function, push a selection of rows through it, compare with all rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from moeca_compile.graph.evaluate import Evaluator
from moeca_compile.graph.layout import Layout, RowSpace, Selection, gather_rows, row_layout
from moeca_compile.graph.pull import RowPuller
from moeca_compile.torch_compat import new_fake_mode

SAMPLES, TOKENS, WIDTH = 2, 6, 8
SPACE = RowSpace(SAMPLES, TOKENS)
# Rows in no order, of both samples, one of them twice.
EACH = Selection(SPACE, torch.tensor([4, 1, 3, 3, 11, 6, 7, 9]), 4, per_sample=True)
FLAT = Selection(SPACE, torch.tensor([10, 2, 7, 0, 2]), 5, per_sample=False)
aten = torch.ops.aten
# Constants made inside a graph stop a push: they are gathered, which costs nothing.
MADE = {
    aten.arange.default,
    aten.zeros.default,
    aten.ones.default,
    aten.stack.default,
    aten.lift_fresh_copy.default,
    aten.detach_.default,
}
SELECTIONS = {"per sample": EACH, "flat": FLAT}


@dataclass(frozen=True)
class Pushed:
    """What became of a request: ops run on rows, and op -> reason where it stopped."""

    targets: frozenset[Any]
    stops: dict[Any, str]


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def tokens(seed: int = 0) -> Tensor:
    """x [B, N, D]."""
    return tensor(SAMPLES, TOKENS, WIDTH, seed=seed)


def trace(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> GraphModule:
    """The function as a pre-dispatch ATen graph with static shapes, as `retrace` makes it."""
    mode = new_fake_mode()
    with torch.no_grad(), mode:
        fakes = [mode.from_tensor(t, static_shapes=True) for t in inputs]
        gm = make_fx(function, pre_dispatch=True)(*fakes)
    gm.graph.eliminate_dead_code()
    return gm


def push(
    function: Callable[..., Tensor],
    *inputs: Tensor,
    selection: Selection,
    layout: Layout | None = None,
    tolerance: float = 1e-10,
) -> Pushed:
    """Push `selection` through the function and compare with the full result, gathered."""
    gm = trace(function, inputs)
    holes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    evaluator = Evaluator(gm, dict(zip(holes, inputs, strict=True)))
    result: Any = gm.graph.output_node().args[0]
    if layout is None:
        layout = row_layout(result.meta["val"].shape, selection.space)
        assert layout is not None, "the result has no rows in front"
    puller = RowPuller(selection, evaluator.value, lambda n: n.op != "call_function")
    with torch.no_grad():
        rows = puller.pull(result, layout)
        want = gather_rows(evaluator.value(result), layout, selection)
    torch.testing.assert_close(rows, want, rtol=tolerance, atol=tolerance)
    ran = frozenset(n.target for n in puller.pulled)
    return Pushed(ran, {n.target: reason for n, reason in puller.stops.items()})


def push_any_number(function: Callable[[Tensor], Tensor], x: Tensor, *, per_sample: bool) -> None:
    """Push rows whose number is known only at run time: one graph, run for several numbers."""
    gm = trace(function, (x,))
    result: Any = gm.graph.output_node().args[0]
    layout = row_layout(result.meta["val"].shape, SPACE)
    assert layout is not None
    length = TOKENS if per_sample else SPACE.rows

    def rows_of(x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        count: Any = chosen.sum().item()
        torch._check(count >= 2)
        torch._check(count <= length)
        token = chosen.to(torch.float32).topk(count).indices
        flat = torch.cat([token, token + TOKENS]) if per_sample else token
        hole = next(n for n in gm.graph.nodes if n.op == "placeholder")
        selection = Selection(SPACE, flat, count, per_sample)
        puller = RowPuller(
            selection, Evaluator(gm, {hole: x}).value, lambda n: n.op != "call_function"
        )
        return puller.pull(result, layout), flat

    mode = new_fake_mode()
    with torch.no_grad(), mode:
        holes = (mode.from_tensor(x, static_shapes=True), torch.empty(length, dtype=torch.bool))
        pushed = make_fx(rows_of, pre_dispatch=True)(*holes)
    for count in (2, 3, length):
        chosen = torch.zeros(length, dtype=torch.bool)
        chosen[-count:] = True
        rows, flat = pushed(x, chosen)
        want = gather_rows(function(x), layout, Selection(SPACE, flat, count, per_sample))
        torch.testing.assert_close(rows, want, rtol=1e-6, atol=1e-6)
