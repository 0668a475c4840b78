"""explain: what is matched and what not, with reasons, and the model left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moeca_compile
from graph_runs import compile_model, only_entry, use_graph_level, watched_call
from idioms import inputs, make, trajectory
from idioms.denoiser import Denoiser
from moeca_compile.capture.install import is_installed

CASES = [
    # idiom, router, expert, top_k, shared, attention
    ("split", "softmax", "mlp", 1, 0, "sdpa"),
    ("I1", "softmax_renorm", "swiglu", 2, 1, "manual"),
    ("I2", "sigmoid", "mlp", 4, 2, "rope"),
    ("I8", "topk_softmax", "swiglu", 2, 0, "sdpa"),
    ("I9", "softmax", "swiglu", 2, 1, "rope"),
]


def build(case: tuple) -> tuple[Denoiser, tuple[Tensor, ...]]:
    idiom, router, expert, top_k, shared, attention = case
    model = make(
        idiom,
        router=router,
        expert=expert,
        top_k=top_k,
        shared=shared,
        attention=attention,
        num_experts=6,
        depth=2,
    )
    x, t, y = inputs(model)
    if idiom == "I9":  # compiles in bfloat16 only
        return model.to(torch.bfloat16), (x.bfloat16(), t, y)
    return model, (x, t, y)


def attributes(model: nn.Module) -> list[tuple[str, list[str]]]:
    return [(name, sorted(vars(module))) for name, module in model.named_modules()]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_every_idiom(case: tuple) -> None:
    model, call = build(case)
    with torch.no_grad():
        before = model(*call)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    shape = attributes(model)
    random = torch.get_rng_state()

    report = moeca_compile.explain(model, *call)

    assert report.graph_breaks == 0
    assert report.cache_bytes > 0
    assert [(r.kind, r.matched, r.reason) for r in report.regions] == [
        ("moe", True, ""),
        ("attention", True, ""),
    ] * 2
    moe = [r for r in report.regions if r.kind == "moe"]
    # the module whose code runs the experts: the layer itself, or the bank where it dispatches
    inner = "" if case[0] in ("split", "I1") else ".experts"
    assert [r.name for r in moe] == [f"blocks.{i}.moe{inner}" for i in range(2)]
    assert {(r.num_experts, r.top_k) for r in moe} == {(6, case[3])}
    attention = [r for r in report.regions if r.kind == "attention"]
    assert [r.name for r in attention] == ["blocks.0.attn", "blocks.1.attn"]
    assert {(r.num_experts, r.top_k) for r in attention} == {(None, None)}
    text = str(report)
    assert f"6 experts, top-{case[3]}, {case[4] and 1} shared" in text or case[4] == 2
    assert f"{report.cache_bytes:,} bytes per lane" in text
    assert ".py:" in text, "a place in the user's code"

    assert not is_installed(model)
    assert attributes(model) == shape
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    with torch.no_grad():
        assert torch.equal(model(*call), before)


def test_a_refused_dispatch_shows_its_reason() -> None:
    model = make("I1_capacity", depth=2)
    call = inputs(model)
    report = moeca_compile.explain(model, *call)
    assert report.cache_bytes == 0
    assert report.graph_breaks > 0
    refused = [r for r in report.regions if r.kind == "moe"]
    assert [r.name for r in refused] == ["blocks.0.moe", "blocks.1.moe"]
    for region in refused:
        assert not region.matched
        assert region.num_experts == 8
        assert "gives other values than the original" in region.reason
        assert "slices.py" in region.location
    assert "gives other values" in str(report).replace("\n", " ")
    assert not is_installed(model)


class Dense(nn.Module):
    """Counts its calls in a buffer and in an attribute, and draws a random number."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        return self.layer(x) + torch.rand(())


def test_a_model_without_experts_and_side_effects() -> None:
    model, x = Dense().eval(), torch.randn(2, 4)
    random = torch.get_rng_state()
    report = moeca_compile.explain(model, x)
    assert (report.regions, report.cache_bytes, report.graph_breaks) == ((), 0, 0)
    assert "no regions" in str(report)
    assert int(model.calls) == 0
    assert model.last is None
    assert torch.equal(torch.get_rng_state(), random)
    with pytest.raises(TypeError, match="expected a module"):
        moeca_compile.explain(lambda x: x, x)  # type: ignore[arg-type, return-value]


def test_training_mode_is_noted_and_kept() -> None:
    model = make("I8", depth=1).train()
    report = moeca_compile.explain(model, *inputs(model))
    assert "the model is in training mode" in str(report)
    assert model.training


def test_what_the_model_raises_comes_through() -> None:
    model = make("I1", depth=1)
    x, t, _ = inputs(model)
    with pytest.raises(IndexError):
        moeca_compile.explain(model, x, t, torch.tensor([500, 0]))
    assert not is_installed(model)


def test_a_compiled_model_goes_on_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of reports: they count against no recompile limit and touch no rows."""
    use_graph_level(monkeypatch)
    model = make("I1", depth=1, num_experts=4)
    calls = trajectory(model, 3, dx=0.05)
    compiled = compile_model(model, calls[0], policy="moeca")
    assert watched_call(compiled, *calls[0]).kind == "refresh"
    with torch._dynamo.config.patch(recompile_limit=2):
        told = [moeca_compile.explain(compiled, *calls[0]) for _ in range(3)]
    assert {report.cache_bytes for report in told} == {only_entry(compiled).cache_bytes}
    assert {len(report.regions) for report in told} == {2}
    with torch.compiler.set_stance("fail_on_recompile"):
        assert [watched_call(compiled, *call).kind for call in calls[1:]] == ["reuse", "reuse"]
    assert moeca_compile.stats(compiled).steps == 3
