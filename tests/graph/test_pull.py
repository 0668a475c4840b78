"""Every push-down rule: rows computed alone equal the rows of the whole result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from graph.attention_functions import ATTENTIONS, BIG, HEAD, HEADS, heads, pushed_attention
from graph.pushing import EACH, MADE, SELECTIONS, push, push_any_number, tokens, trace
from graph.row_functions import PUSHED, W, pushed_through
from moeca_compile.graph.evaluate import Evaluator
from moeca_compile.graph.layout import Factor, Selection, free, gather_rows, row_layout
from moeca_compile.graph.pull import RowPuller
from moeca_compile.graph.row_rules import RULES, rule_for

aten = torch.ops.aten


@pytest.mark.parametrize("form", SELECTIONS)
@pytest.mark.parametrize("name", PUSHED)
def test_rows_go_through(name: str, form: str) -> None:
    pushed = pushed_through(name, form)
    assert pushed.targets, "nothing was computed on rows"
    assert not {t for t in pushed.stops if t not in MADE}


# name -> (function, part of the reason why the rows cannot be followed to x)
STOPPED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "token axis split": (lambda x: F.silu(x.view(2, 2, 3, 8)).reshape(2, 6, 8), "cuts through"),
    "tokens split": (
        lambda x: F.linear(torch.cat([x, x], 1)[:, 3:9], W),
        "several parts",
    ),
    "every second row": (
        lambda x: F.linear(torch.cat([x, x], 1), W)[:, ::2],
        "part of the token rows",
    ),
    "text and image joined": (lambda x: torch.cat([x[:, 3:], x[:, :3]], 1), "cat along"),
    "flip over tokens": (lambda x: x.flip(1), "mixes token rows"),
    "roll over tokens": (lambda x: x.roll(1, 1), "mixes token rows"),
    "roll over everything": (lambda x: x.roll(1), "mixes token rows"),
    "softmax over tokens": (lambda x: x.softmax(1), "mixes token rows"),
    "cumsum over tokens": (lambda x: x.cumsum(1), "mixes token rows"),
    "norm over tokens": (lambda x: F.layer_norm(x, (6, 8)), "mixes token rows"),
    "group norm": (lambda x: F.group_norm(x.mT, 2).mT, "mixes token rows"),
    "causal": (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), "causal"),
    "rows broadcast": (lambda x: x[:, :1].expand(2, 6, 8) * 2, "broadcast"),
    "rows of the batch mixed": (lambda x: x.flip(0), "mixes token rows"),
    "padding of tokens": (lambda x: F.pad(x, (0, 0, 1, -1)), "mixes token rows"),
    "repeated rows": (lambda x: x[:, :3].repeat(1, 2, 1), "mixes token rows"),
    "tokens as features": (lambda x: F.linear(x.mT, W[:6, :6]).mT, "mixes token rows"),
    "tokens in the second factor": (lambda x: (W @ x.mT).mT, "mixes token rows"),
    "diagonal": (lambda x: torch.einsum("bnn,bnd->bnd", x @ x.mT, x), "diagonal"),
    "implicit einsum": (lambda x: torch.einsum("bnd,dz", x, W), "explicit output"),
    "gather of tokens": (lambda x: x.gather(1, x.argsort(1)), "mixes token rows"),
    "tokens by index": (lambda x: x[:, torch.tensor([5, 4, 3, 2, 1, 0])] * 2, "rows both"),
    "dropout": (lambda x: F.dropout(x, 0.5, True) * 0, "random"),
    "in place": (lambda x: x.clone().add_(1), "no push-down rule"),
    "no rule": (lambda x: torch.matrix_exp(x @ x.mT * 0.1) @ x, "no push-down rule"),
}


@pytest.mark.parametrize("form", SELECTIONS)
@pytest.mark.parametrize("name", STOPPED)
def test_where_rows_are_mixed_the_push_stops_and_stays_right(name: str, form: str) -> None:
    function, reason = STOPPED[name]
    pushed = push(function, tokens(), selection=SELECTIONS[form])
    assert any(reason in r for r in pushed.stops.values()), pushed.stops


@pytest.mark.parametrize("form", SELECTIONS)
def test_token_rows_without_a_sample_dim(form: str) -> None:
    """x [B * N, D], as experts see it."""

    def expert(x: Tensor) -> Tensor:
        gate, up = F.linear(F.layer_norm(x, (8,)), BIG[0][:16]).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, W)

    pushed = push(expert, tokens().view(12, 8), selection=SELECTIONS[form])
    assert aten.linear.default in pushed.targets
    assert not pushed.stops


@pytest.mark.parametrize("form", SELECTIONS)
def test_one_row_is_not_squeezed_away(form: str) -> None:
    one = {
        "per sample": Selection(EACH.space, torch.tensor([3, 8]), 1, per_sample=True),
        "flat": Selection(EACH.space, torch.tensor([8]), 1, per_sample=False),
    }
    for function in (
        lambda x: F.silu(x.unsqueeze(2)).squeeze(),
        lambda x: F.silu(x).squeeze(0).squeeze(1),
        lambda x: F.silu(x).squeeze((0, 1)),
    ):
        pushed = push(function, tokens(), selection=one[form])
        assert not pushed.stops


@pytest.mark.parametrize("form", SELECTIONS)
def test_rows_in_any_layout(form: str) -> None:
    """A value whose rows are not in front: keys [B, H, N, d]."""
    layout = ((Factor(2, "b"),), free(HEADS), (Factor(6, "n"),), free(HEAD))
    pushed = push(lambda x: heads(x)[1], tokens(), selection=SELECTIONS[form], layout=layout)
    assert aten.linear.default in pushed.targets
    assert not pushed.stops


SYMBOLIC = [
    "both",
    "matmul per row",
    "group norm of rows",
    "reductions",
    "cat",
    "gather",
    "embedding",
    "repeat",
    "expand",
    "squeeze all",
    "complex views",
]


@pytest.mark.parametrize("form", SELECTIONS)
@pytest.mark.parametrize("name", SYMBOLIC)
def test_one_graph_serves_any_number_of_rows(name: str, form: str) -> None:
    push_any_number(PUSHED[name], tokens(), per_sample=form == "per sample")


def test_shared_values_are_computed_once() -> None:
    """Two readers of a value, one of them through another shape, share its rows."""
    calls: list[Node] = []

    class Counting(RowPuller):
        def call(self, node: Node, args: Any, kwargs: Any) -> Any:
            calls.append(node)
            return super().call(node, args, kwargs)

    def function(x: Tensor) -> Tensor:
        inner = torch.tanh(x)
        heads = inner.view(2, 6, 2, 4)
        return (
            inner + (heads * 2).reshape(2, 6, 8) + heads.transpose(1, 2).transpose(1, 2).flatten(2)
        )

    gm = trace(function, (tokens(),))
    (hole,) = (n for n in gm.graph.nodes if n.op == "placeholder")
    puller = Counting(EACH, Evaluator(gm, {hole: tokens()}).value, lambda n: n is hole)
    result: Any = gm.graph.output_node().args[0]
    layout = row_layout((2, 6, 8), EACH.space)
    assert layout is not None
    puller.pull(result, layout)
    assert [n.target for n in calls].count(aten.tanh.default) == 1


def test_the_push_ends_at_values_that_are_there_anyway() -> None:
    gm = trace(lambda x: F.silu(F.linear(torch.tanh(x), W)), (tokens(),))
    by_target = {n.target: n for n in gm.graph.nodes}
    (hole,) = (n for n in gm.graph.nodes if n.op == "placeholder")
    evaluator = Evaluator(gm, {hole: tokens()})
    there = by_target[aten.linear.default]
    puller = RowPuller(EACH, evaluator.value, lambda n: n is there)
    layout = row_layout((2, 6, 8), EACH.space)
    assert layout is not None
    rows = puller.pull(by_target[aten.silu.default], layout)
    torch.testing.assert_close(
        rows, gather_rows(F.silu(F.linear(torch.tanh(tokens()), W)), layout, EACH)
    )
    assert puller.pulled == {by_target[aten.silu.default]}
    assert puller.stops == {}


def test_every_rule_is_pushed_through_here() -> None:
    ran: set[Any] = set()
    for name in PUSHED:
        ran |= pushed_through(name, "per sample").targets
    for name in ATTENTIONS:
        ran |= pushed_attention(name).targets
    assert set(RULES) - ran == set()


def test_in_place_and_random_ops_have_no_rule() -> None:
    assert rule_for(aten.add_.Tensor) is None
    assert rule_for(aten.bernoulli.default) is None
    assert rule_for(torch.ops.aten.rrelu_with_noise.default) is None
    assert rule_for(len) is None
