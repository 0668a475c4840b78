"""A step waits for no device: what its graph reads on the host comes from inputs on the host.

On a CPU every tensor is one of the host, so the graph is judged by where values come from: only
the counts of a budget may reach `.item()`. With a CUDA build of torch the same is looked at on fake
CUDA tensors, which need no GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node

import moeca_compile
from graph_runs import WatchedStep, compile_model, only_entry, use_graph_level, watched_call
from idioms import inputs, make, trajectory
from moeca_compile.debug.dump import Dumper
from moeca_compile.graph.dataflow import ancestors
from moeca_compile.lowering import grouped
from moeca_compile.lowering.grouped import grouped_product
from moeca_compile.lowering.lower import lower, trace
from moeca_compile.lowering.variants import Variants
from moeca_compile.options import Options
from moeca_compile.passes.count_flops import count_costs
from moeca_compile.passes.reuse_layer import ReuseLayer
from moeca_compile.pipeline import analyse
from moeca_compile.runtime.stats import Stats
from moeca_compile.torch_compat import inductor, mark_static, new_fake_mode

aten = torch.ops.aten
BUDGETED = {"interval": 4, "budget": 0.25, "order": "attention_first"}
READS = {
    aten.item.default,
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.unique_consecutive.default,
}


def dynamo_graph(dtype: torch.dtype, **size: Any) -> tuple[GraphModule, list[Any]]:
    """The graph of a tiny model with stacked experts, and its inputs."""
    kept: list[tuple[GraphModule, list[Any]]] = []

    def keep(gm: GraphModule, example: list[Any]) -> Any:
        kept.append((gm, example))
        return gm.forward

    model = make("I8", depth=1, num_experts=4, expert="swiglu", **size).to(dtype)
    x, t, y = inputs(model)
    with torch.no_grad():
        torch.compile(model, backend=keep)(x.to(dtype), t, y)
    return kept[0]


def variants(graph: tuple[GraphModule, list[Any]], options: dict[str, Any]) -> Variants:
    parsed = Options.parse(options)
    return Variants(analyse(*graph, parsed, Dumper(None)), parsed, {}, Dumper(None))


def reads(gm: GraphModule) -> list[Node]:
    """What waits for its operand to be known on the host."""
    return [n for n in gm.graph.nodes if n.target in READS or "nonzero" in str(n.target)]


def holes_behind(gm: GraphModule, nodes: list[Node]) -> set[int]:
    """Positions of the graph inputs that the nodes depend on."""
    holes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return {holes.index(n) for n in ancestors(nodes) if n.op == "placeholder"}


@pytest.fixture(scope="module")
def budgeted() -> Variants:
    return variants(dynamo_graph(torch.float32), BUDGETED)


@pytest.mark.parametrize("variant", ["refresh", "reuse"])
def test_only_the_counts_of_the_budget_are_read(budgeted: Variants, variant: str) -> None:
    graph, fakes = budgeted.lowered(variant)
    found = reads(graph)
    assert bool(found) == (variant == "reuse"), "the counts are read; nothing else is"
    assert holes_behind(graph, found) <= {len(fakes) - 1}
    assert not found or fakes[-1].device.type == "cpu"


@pytest.mark.parametrize("idiom", ["I1", "I7", pytest.param("I5", marks=pytest.mark.slow)])
def test_no_size_is_read_from_a_device(monkeypatch: pytest.MonkeyPatch, idiom: str) -> None:
    """The paper's order attends the tokens that have a computed branch. Where reading their number
    would wait for a device, as many as there could be are computed, and the same are stored."""
    use_graph_level(monkeypatch)
    model = make(idiom, depth=1, num_experts=4)
    calls = trajectory(model, 4, dx=0.05)

    def steps() -> tuple[bool, list[WatchedStep], Stats]:
        torch._dynamo.reset()
        compiled = compile_model(model, calls[0], policy="moeca", interval=4, budget=0.2)
        ran = [watched_call(compiled, *call) for call in calls]
        graph, fakes = only_entry(compiled).variants.lowered("reuse")
        waits = bool(holes_behind(graph, reads(graph)) - {len(fakes) - 1})
        return waits, ran, moeca_compile.stats(compiled)

    reading, expected, few = steps()
    monkeypatch.setattr(ReuseLayer, "reads_sizes", False)
    waiting, found, many = steps()
    assert reading and not waiting
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.output, b.output, rtol=1e-5, atol=1e-5)
        assert (a.kind, a.pairs, a.attended) == (b.kind, b.pairs, b.attended)
    assert many.layers[0].tokens_attended == few.layers[0].tokens_attended
    assert many.speedup_flops <= few.speedup_flops, "padding is counted as computed"


def test_the_check_finds_a_read_of_the_data(budgeted: Variants) -> None:
    """The threshold rule reads how many branches passed: the reason why it waits for a GPU."""
    loose = variants(dynamo_graph(torch.float32), {"interval": 4})
    graph, _ = loose.lowered("reuse")
    assert holes_behind(graph, reads(graph)), "the data decides how many rows are computed"


def test_fixed_counts_leave_no_read_and_no_open_size(budgeted: Variants) -> None:
    """What CUDA graphs replay: another budget is another graph."""
    budgeted.fixed_counts = True
    try:
        graph, fakes = budgeted.lowered("reuse")
        caches = len(budgeted.analysis.plan.layout.specs)
        assert budgeted.counts("reuse") == 0
        assert len(fakes) == len(budgeted.analysis.aten.inputs) + caches
        assert not reads(graph)
        sizes = [
            s
            for n in graph.graph.nodes
            if isinstance(v := n.meta.get("val"), Tensor)
            for s in v.shape
        ]
        assert sizes and all(type(s) is int for s in sizes)
        budgeted._compiled["reuse"] = lambda: None
        budgeted.steer(Options.parse(BUDGETED | {"tau": 0.5}))
        assert "reuse" in budgeted._compiled
        budgeted.steer(Options.parse(BUDGETED | {"budget": 0.5}))
        assert "reuse" not in budgeted._compiled
    finally:
        budgeted.fixed_counts = False
        budgeted.options = Options.parse(BUDGETED)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_grouped_product_equals_the_op(stacked: bool, biased: bool) -> None:
    """bfloat16, as on a GPU; experts without rows, and rows past the last end."""
    torch.manual_seed(0)
    rows, weight, bias = torch.randn(20, 16), torch.randn(5, 24, 16), torch.randn(5, 24)
    rows, weight, bias = (v.bfloat16() for v in (rows, weight, bias))
    ends = torch.tensor([0, 7, 7, 16, 17])
    banks = [weight] if stacked else list(weight.unbind())
    shifts = ([bias] if stacked else list(bias.unbind())) if biased else []
    found = grouped_product(rows, ends, banks, shifts)
    expected = torch.ops.moeca.grouped_linear(rows, ends, banks, shifts)
    assert found.dtype == torch.bfloat16 and not found[17:].any()
    assert (found - expected).abs().max() <= 2e-2 * expected.abs().max()


def test_lists_of_weights_are_lowered_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bank of modules hands over a list; a body that is no plain chain takes this way on a CPU
    as well."""
    rows, ends = torch.empty(6, 16), torch.empty(3, dtype=torch.int64)
    weights = [torch.empty(8, 16) for _ in range(3)]

    def body(*given: Tensor) -> Tensor:
        return torch.ops.moeca.grouped_linear(given[0], given[1], list(given[2:]), [])

    mode = new_fake_mode()
    fakes = [mode.from_tensor(v) for v in (rows, ends, *weights)]
    kept = lower(trace(body, fakes, mode), mode)
    assert [n.target for n in kept.graph.nodes if n.op == "call_function"] == [
        torch.ops.moeca.grouped_linear.default
    ]
    monkeypatch.setattr(grouped, "on_device", lambda rows, weights: True)
    fakes = [
        mode.from_tensor(v.bfloat16() if v.is_floating_point() else v)
        for v in (rows, ends, *weights)
    ]
    targets = {n.target for n in lower(trace(body, fakes, mode), mode).graph.nodes}
    assert {aten._grouped_mm.default, aten.stack.default} <= targets
    assert torch.ops.moeca.grouped_linear.default not in targets


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is a CPU build: no fake CUDA tensors")
@pytest.mark.parametrize("variant", ["plain", "refresh", "reuse"])
def test_on_cuda_everything_stays_there(variant: str) -> None:
    gm, example = dynamo_graph(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = [
            torch.empty_like(v, device="cuda") if isinstance(v, Tensor) else v for v in example
        ]
    made = variants((gm, given), BUDGETED)
    assert count_costs(made.analysis.aten, made.analysis.plan, made.options).layers
    graph, fakes = made.lowered(variant)
    targets = {n.target for n in graph.graph.nodes}
    assert aten._grouped_mm.default in targets
    assert torch.ops.moeca.grouped_linear.default not in targets
    assert holes_behind(graph, reads(graph)) <= ({len(fakes) - 1} if variant == "reuse" else set())
    values = {n: n.meta["val"] for n in graph.graph.nodes if isinstance(n.meta.get("val"), Tensor)}
    on_host = {n for n, v in values.items() if v.device.type == "cpu"}
    assert holes_behind(graph, list(on_host)) <= ({len(fakes) - 1} if variant == "reuse" else set())
    crossing = [n for n in values.keys() - on_host if set(n.all_input_nodes) & on_host]
    assert not crossing, "nothing is copied between host and device"


class Reached(BaseException):
    """Ends a compilation where there is nothing more to see; no Exception, so that nobody wraps
    it."""


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["plain", "refresh", "reuse"])
def test_weights_and_caches_are_static_inputs(budgeted: Variants, variant: str) -> None:
    """What CUDA graphs may read and write in place: all of the model's and the lane's tensors."""
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx

    seen: list[Any] = []

    def spy(gm: GraphModule, example: Any, **kwargs: Any) -> Any:
        context = TracingContext.get()
        assert context.fw_metadata is not None
        seen.append(context.fw_metadata.static_input_indices)
        raise Reached

    graph, fakes = budgeted.lowered(variant)
    static = budgeted.static_inputs(variant)
    mark_static(graph, static)
    mode = budgeted.analysis.aten.fake_mode
    with pytest.raises(Reached), torch.no_grad(), tracing(TracingContext(mode)):
        compile_fx(graph, fakes, inner_compile=spy)
    (found,) = seen
    assert set(found) == static
    user = len(budgeted.analysis.aten.inputs) - sum(
        i.is_parameter for i in budgeted.analysis.aten.inputs
    )
    assert len(fakes) - len(static) == user + budgeted.counts(variant), "x, t, y and the counts"


@pytest.mark.compile
def test_constants_of_a_graph_compile() -> None:
    """Code that makes a tensor of Python numbers leaves a constant in the graph, which is lifted to
    an input in front of all others."""
    mode = new_fake_mode()
    root = torch.nn.Module()
    root.register_buffer("constant", torch.arange(3.0))
    graph = torch.fx.Graph()
    rows, cache = graph.placeholder("rows"), graph.placeholder("cache")
    total = graph.call_function(aten.add.Tensor, (rows, graph.get_attr("constant")))
    graph.output((graph.call_function(aten.mul.Tensor, (total, cache)),))
    gm = GraphModule(root, graph)
    mark_static(gm, {1})
    given = [torch.ones(2, 3), torch.full((2, 3), 2.0)]
    compiled = inductor(gm, [mode.from_tensor(v) for v in given], mode, {})
    with torch.no_grad():
        (found,) = compiled(*given)
    assert torch.equal(found, (torch.ones(2, 3) + torch.arange(3.0)) * 2)
