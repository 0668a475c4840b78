"""Routed experts as one body on sorted rows, against a loop over experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule

import moeca_compile.ops  # noqa: F401
from graph.pushing import tensor, trace
from moeca_compile.graph.experts import (
    ExpertRows,
    SortedRows,
    num_experts_of,
    per_expert,
    routed_experts,
    sort_branches,
)
from moeca_compile.graph.row_rules import Stop

TOKENS, SLOTS, EXPERTS, WIDTH, HIDDEN = 7, 2, 4, 6, 8
IDS = torch.tensor([[0, 3], [3, 1], [1, 0], [3, 0], [0, 1], [1, 3], [3, 1]])  # nobody takes 2
Expert = Callable[..., Tensor]


def mlp(x: Tensor, w: Tensor, b: Tensor, v: Tensor, c: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w, b)), v, c)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def packed_swiglu(x: Tensor, both: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, both).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def normed(x: Tensor, weight: Tensor, w: Tensor) -> Tensor:
    scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight
    return x + F.linear(scaled, w)


def fused_norms(x: Tensor, g: Tensor, b: Tensor, h: Tensor, w: Tensor) -> Tensor:
    """Norms whose weights differ from expert to expert."""
    inner = F.rms_norm(F.layer_norm(x, (WIDTH,), g, b, 1e-3), (WIDTH,), h, 1e-3)
    return F.linear(inner, w)


def transposed(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Weights [in, out], used as `x @ w`."""
    return torch.matmul(F.silu(x @ w), v)


def split_weights(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Tensor parallel inside one device: partial linears of slices of the weights."""
    up = torch.cat([F.linear(x, part) for part in w.split(HIDDEN // 2, dim=0)], dim=-1)
    halves = F.silu(up).split(HIDDEN // 2, dim=-1)
    slices = v.split(HIDDEN // 2, dim=1)
    return F.linear(halves[0], slices[0]) + F.linear(halves[1], slices[1])


def conditioned(x: Tensor, c: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    """Two row inputs."""
    return F.linear(x * (1 + c), w) * scale + c


def scaled_weight(x: Tensor, w: Tensor, g: Tensor) -> Tensor:
    """A parameter computed from parameters (weight normalisation)."""
    return F.linear(x, w * (g / w.norm(dim=1)).unsqueeze(1))


UP, DOWN = (HIDDEN, WIDTH), (WIDTH, HIDDEN)
# name -> (expert, number of row inputs, shapes of its parameters)
BODIES: dict[str, tuple[Expert, int, list[tuple[int, ...]]]] = {
    "mlp": (mlp, 1, [UP, (HIDDEN,), DOWN, (WIDTH,)]),
    "swiglu": (swiglu, 1, [UP, UP, DOWN]),
    "packed swiglu": (packed_swiglu, 1, [(2 * HIDDEN, WIDTH), DOWN]),
    "normed": (normed, 1, [(WIDTH,), (WIDTH, WIDTH)]),
    "fused norms": (fused_norms, 1, [(WIDTH,), (WIDTH,), (WIDTH,), (WIDTH, WIDTH)]),
    "transposed": (transposed, 1, [DOWN, UP]),
    "split weights": (split_weights, 1, [UP, DOWN]),
    "conditioned": (conditioned, 2, [(WIDTH, WIDTH), (WIDTH,)]),
    "scaled weight": (scaled_weight, 1, [(WIDTH, WIDTH), (WIDTH,)]),
}


def make_body(expert: Expert, rows: int, shapes: list[tuple[int, ...]]) -> GraphModule:
    inputs = [tensor(TOKENS, WIDTH, seed=i) for i in range(rows)]
    gm = trace(expert, (*inputs, *(tensor(*s) for s in shapes)))
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    output.args = ((output.args[0],),)
    return gm


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[list[Tensor]]:
    """One list of E tensors for each parameter."""
    return [
        [tensor(*s, seed=10 * j + e, dtype=dtype) for e in range(EXPERTS)]
        for j, s in enumerate(shapes)
    ]


def by_loop(expert: Expert, ids: Tensor, rows: list[Tensor], params: list[list[Tensor]]) -> Tensor:
    """[T, K, D], one row and one slot at a time."""

    def one(token: int, number: int) -> Tensor:
        given = [r[token : token + 1] for r in rows]
        return expert(*given, *(p[number] for p in params))[0]

    return torch.stack(
        [torch.stack([one(t, e) for e in chosen]) for t, chosen in enumerate(ids.tolist())]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", ["listed", "stacked", "mixed"])
@pytest.mark.parametrize("name", BODIES)
def test_routed_rows_equal_a_loop_over_tokens(name: str, form: str, dtype: torch.dtype) -> None:
    expert, count, shapes = BODIES[name]
    body = make_body(expert, count, shapes)
    params = parameters(shapes, dtype)
    rows = [tensor(TOKENS, WIDTH, seed=50 + i, dtype=dtype) for i in range(count)]
    stacked: dict[str, Callable[[int], bool]] = {
        "listed": lambda j: False,
        "stacked": lambda j: True,
        "mixed": lambda j: j % 2 == 0,
    }
    given = [torch.stack(p) if stacked[form](j) else tuple(p) for j, p in enumerate(params)]
    got = routed_experts(body, IDS, rows, given)
    want = by_loop(expert, IDS, rows, params)
    assert got.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["mlp", "packed swiglu"])
def test_equal_numbers_of_rows_equal_a_loop_over_experts(name: str) -> None:
    """As one batched product, biases included."""
    expert, inputs, shapes = BODIES[name]
    each, params = 3, parameters(shapes, torch.float64)
    rows = [tensor(EXPERTS * each, WIDTH, seed=5 + i) for i in range(inputs)]
    groups = SortedRows(
        torch.arange(1, EXPERTS + 1) * each, torch.arange(EXPERTS).repeat_interleave(each), each
    )
    banks = [per_expert(torch.stack(p)) for p in params]
    got = ExpertRows(make_body(expert, inputs, shapes), rows, banks, groups).run()
    parts = [[r[e * each : (e + 1) * each] for r in rows] for e in range(EXPERTS)]
    want = torch.cat([expert(*part, *(p[e] for p in params)) for e, part in enumerate(parts)])
    torch.testing.assert_close(got, want)


def test_branches_are_grouped_by_expert_in_order() -> None:
    order, groups = sort_branches(torch.tensor([2, 0, 2, 0, 1]), 4)
    assert order.tolist() == [1, 3, 4, 0, 2]
    assert groups.ends.tolist() == [2, 3, 5, 5]
    assert groups.experts.tolist() == [0, 0, 1, 2, 2]


def test_branches_not_computed_come_last_and_belong_to_no_group() -> None:
    computed = torch.tensor([True, False, True, True, False])
    order, groups = sort_branches(torch.tensor([2, 0, 1, 0, 1]), 3, computed)
    assert order.tolist() == [3, 2, 0, 1, 4]
    assert groups.ends.tolist() == [1, 2, 3]
    assert groups.experts.max() < 3  # padding rows read a parameter that exists


def test_nothing_computed() -> None:
    none = torch.zeros(3, dtype=torch.bool)
    _, groups = sort_branches(torch.tensor([2, 0, 1]), 3, none)
    assert groups.ends.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", BODIES)
def test_padding_rows_leave_the_others_alone(name: str) -> None:
    expert, count, shapes = BODIES[name]
    body = make_body(expert, count, shapes)
    params = parameters(shapes, torch.float64)
    flat = IDS.reshape(-1)
    computed = torch.rand(flat.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    order, groups = sort_branches(flat, EXPERTS, computed)
    rows = [tensor(TOKENS, WIDTH, seed=50 + i) for i in range(count)]
    picked = [r.index_select(0, order // SLOTS) for r in rows]
    out = ExpertRows(body, picked, [per_expert(tuple(p)) for p in params], groups).run()
    want = by_loop(expert, IDS, rows, params).reshape(-1, WIDTH)
    kept = int(computed.sum())
    assert 0 < kept < len(flat)
    torch.testing.assert_close(out[:kept], want[order[:kept]])
    assert out.isfinite().all()


def test_rows_of_more_than_one_dim() -> None:
    """Heads inside an expert: [T, h, d] in the middle of the body."""

    def expert(x: Tensor, w: Tensor, g: Tensor) -> Tensor:
        heads = F.linear(x, w).unflatten(-1, (2, 3))
        return (F.normalize(heads, dim=-1) * g).flatten(1)

    shapes = [(WIDTH, WIDTH), (3,)]
    body = make_body(expert, 1, shapes)
    params = parameters(shapes, torch.float64)
    rows = [tensor(TOKENS, WIDTH, seed=50)]
    got = routed_experts(body, IDS, rows, [tuple(p) for p in params])
    torch.testing.assert_close(got, by_loop(expert, IDS, rows, params))


MIXING: dict[str, tuple[Expert, list[tuple[int, ...]]]] = {
    "softmax over rows": (lambda x, w: F.linear(x, w).softmax(0), [(WIDTH, WIDTH)]),
    "softmax of its input": (lambda x, w: F.linear(x.softmax(0), w), [(WIDTH, WIDTH)]),
    "mean over rows": (lambda x, w: F.linear(x - x.mean(0, keepdim=True), w), [(WIDTH, WIDTH)]),
    "rows times rows": (lambda x, w: F.linear((x @ x.t()) @ x, w), [(WIDTH, WIDTH)]),
    "cumsum": (lambda x, w: F.linear(x.cumsum(0), w), [(WIDTH, WIDTH)]),
    "flip": (lambda x, w: F.linear(x, w).flip(0), [(WIDTH, WIDTH)]),
    "batch norm": (lambda x, w: (F.linear(x, w) - x.mean()) / x.var(0), [(WIDTH, WIDTH)]),
    "rows as features": (lambda x, w: F.linear(x.t(), w).t(), [(TOKENS, TOKENS)]),
    "own table for each row": (lambda x, w: x * w, [(TOKENS, WIDTH)]),
}


@pytest.mark.parametrize("name", MIXING)
def test_a_body_that_mixes_rows_is_refused(name: str) -> None:
    expert, shapes = MIXING[name]
    body = make_body(expert, 1, shapes)
    params: list[Any] = [tuple(p) for p in parameters(shapes, torch.float64)]
    with pytest.raises(Stop):
        routed_experts(body, IDS, [tensor(TOKENS, WIDTH)], params)


def test_a_body_that_ignores_its_rows_is_refused() -> None:
    body = make_body(lambda x, w: w * 2, 1, [(TOKENS, WIDTH)])
    params: list[Any] = [tuple(p) for p in parameters([(TOKENS, WIDTH)], torch.float64)]
    with pytest.raises(Stop):
        routed_experts(body, IDS, [tensor(TOKENS, WIDTH)], params)


def test_experts_are_counted_from_lists_nodes_and_tensors() -> None:
    assert num_experts_of([(tensor(2), tensor(2), tensor(2))]) == 3
    assert num_experts_of([tensor(5, 2)]) == 5
    node = Graph().placeholder("stacked")
    node.meta["val"] = tensor(6, 2)
    assert num_experts_of([node]) == 6
    with pytest.raises(ValueError, match="without parameters"):
        num_experts_of([])
