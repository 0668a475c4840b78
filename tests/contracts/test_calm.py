"""Contract "calm": what cannot be cached runs as plain Inductor and says so in one line.

With `strict=True` it raises instead. Inductor is replaced by Dynamo's own graph here. One contract,
one file: its cases are short and have the same checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import moeca_compile
from contracts.generations import assert_fresh, assert_reused, difference, run
from idioms import make, trajectory
from idioms.denoiser import Denoiser
from moeca_compile import UnsupportedError

GRADIENTS = "gradients are on: call the model under torch.no_grad()"
TRAINING = "the model is in training mode; call model.eval()"


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings of this package so far."""
    own = [r for r in caplog.records if r.name.startswith("moeca_compile")]
    return [r.getMessage() for r in own if r.levelname == "WARNING"]


def raises(reason: str, call: Callable[[], Any]) -> None:
    """`strict` errors come through Dynamo's wrapper where the graph is compiled."""
    with pytest.raises((BackendCompilerFailed, UnsupportedError), match="strict=True") as caught:
        call()
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, UnsupportedError)
    assert reason in str(error)


def tiny(idiom: str = "I1") -> tuple[Denoiser, list[tuple[Tensor, Tensor, Tensor]]]:
    model = make(idiom, depth=1, num_experts=4)
    return model, trajectory(model, 12, dx=0.02)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo
@pytest.mark.parametrize("idiom", ["I1", pytest.param("split", marks=pytest.mark.slow), "I8"])
def test_gradients(plain_graphs: list[str], caplog: pytest.LogCaptureFixture, idiom: str) -> None:
    model, calls = tiny(idiom)
    compiled = torch.compile(model, backend="moeca", options={"policy": "moeca"})
    for call in calls[:3]:
        run(compiled, *call)
    assert moeca_compile.stats(compiled).reuse_steps > 0
    steps = moeca_compile.stats(compiled).steps
    assert lines(caplog) == []

    x, t, y = calls[3]
    grads = []
    for function in (compiled, compiled, model):
        leaf = x.clone().requires_grad_()
        function(leaf, t, y).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads[1], grads[2], rtol=1e-4, atol=1e-5)
    assert moeca_compile.stats(compiled).steps == steps
    (line,) = lines(caplog)
    assert GRADIENTS in line

    # Dynamo gave up on the broken forward; caching comes back within three calls
    ran = [run(compiled, *call) for call in calls[4:9]]
    assert [r.kind for r in ran[3:]] == ["reuse", "reuse"]
    assert len(lines(caplog)) == 1


def test_gradients_are_on_without_anything_that_needs_them(
    plain_graphs: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A forgotten `no_grad`: the dispatch is not replaced, and the line says why."""
    model, calls = tiny()
    compiled = torch.compile(model, backend="moeca")
    for call in calls[:2]:
        torch.testing.assert_close(compiled(*call), model(*call), rtol=1e-5, atol=1e-5)
    (line,) = lines(caplog)
    assert GRADIENTS in line


@pytest.mark.parametrize("idiom", ["I1", "I8"])
def test_training_mode_and_back(
    plain_graphs: list[str], caplog: pytest.LogCaptureFixture, idiom: str
) -> None:
    model, calls = tiny(idiom)
    compiled = torch.compile(model, backend="moeca", options={"policy": "moeca"})
    for call in calls[:4]:
        ran = run(compiled, *call)
    assert ran.kind == "reuse"
    for round in range(2):
        model.train()
        for call in calls[4:6]:
            ran = run(compiled, *call)
            assert ran.kind in ("", "plain")
            assert difference(ran.output, model, *call) <= 1e-5
        (line,) = lines(caplog)
        assert "the model is in training mode" in line
        model.eval()
        ran = [run(compiled, *call) for call in calls[6:12]]
        assert [r.kind for r in ran[3:]].count("reuse") >= 2, f"caching is back, round {round}"


@pytest.mark.parametrize("idiom", ["I8", pytest.param("I1", marks=pytest.mark.slow)])
def test_strict_in_the_wrong_mode(plain_graphs: list[str], idiom: str) -> None:
    model, calls = tiny(idiom)
    compiled = torch.compile(model, backend="moeca", options={"policy": "moeca", "strict": True})
    for call in calls[:3]:
        ran = run(compiled, *call)  # pieces of the first call are no reason to raise
    assert ran.kind == "reuse"
    x, t, y = calls[3]
    raises("gradients are on", lambda: compiled(x.clone().requires_grad_(), t, y))
    model.train()
    raises("training mode", lambda: run(compiled, *calls[3]))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x * t.sin()[:, None])
        return x


def test_a_model_without_experts(plain_graphs: list[str], caplog: pytest.LogCaptureFixture) -> None:
    model = Dense().eval()
    compiled = torch.compile(model, backend="moeca")
    plain_graphs.clear()
    for batch in (2, 3, 4, 2):  # a dynamic graph from the second on
        call = torch.randn(batch, 8), torch.rand(batch)
        ran = run(compiled, *call)
        assert ran.kind == ""
        torch.testing.assert_close(ran.output, model(*call))
    assert plain_graphs == ["in the backend call", "later"]
    assert moeca_compile.stats(compiled).steps == 0
    (line,) = lines(caplog)
    assert "no mixture-of-experts layer" in line and "name a policy" in line
    strict = torch.compile(Dense().eval(), backend="moeca", options={"strict": True})
    raises("no mixture-of-experts layer", lambda: run(strict, *call))


class DenseDenoiser(nn.Module):
    """x [B, C, H, W], t [B] -> [B, C, H, W]: all that forecasting whole steps needs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.leave(self.enter(x).tanh() * t[:, None, None, None].cos())


@pytest.mark.parametrize("given", [{}, {"tolerance": 0.3}, {"policy": "auto"}], ids=str)
def test_a_dense_denoiser_is_cached_only_where_a_policy_is_named(
    plain_graphs: list[str], caplog: pytest.LogCaptureFixture, given: dict[str, Any]
) -> None:
    plain_graphs.clear()
    model = DenseDenoiser().eval()
    compiled = torch.compile(model, backend="moeca", options=given)
    x, t = torch.randn(2, 4, 8, 8), torch.zeros(2)
    with torch.no_grad():
        for step in range(8):
            t = torch.full((2,), 0.9 - 0.02 * step)
            output = compiled(x, t)
            if "policy" not in given:
                torch.testing.assert_close(output, model(x, t))
            x = x - 0.02 * output
    stats, report = moeca_compile.stats(compiled), moeca_compile.explain(compiled, x, t)
    if "policy" in given:
        assert stats.skip_steps > 0 and report.cache_bytes > 0
        assert plain_graphs == [] and lines(caplog) == [] and report.notes == ()
        return
    assert stats.steps == 0 and report.cache_bytes == 0
    assert plain_graphs == ["in the backend call"]
    (line,) = lines(caplog)
    hint = "name a policy, e.g. policy='auto', to cache a dense denoiser"
    assert hint in line and hint in str(report)


def test_an_empty_batch(plain_graphs: list[str], caplog: pytest.LogCaptureFixture) -> None:
    model, calls = tiny()
    moeca_compile.prepare(model, *calls[0])
    compiled = torch.compile(model, backend="moeca", options={"policy": "moeca"})
    assert run(compiled, *calls[0]).kind == "refresh"
    empty = tuple(value[:0] for value in calls[1])
    ran = run(compiled, *empty)
    assert ran.output.shape == (0, 3, 8, 8)
    assert ran.kind == ""
    (line,) = lines(caplog)
    assert "an empty input" in line
    assert_reused(run(compiled, *calls[1]), model, *calls[1])
    strict = torch.compile(model, backend="moeca", options={"strict": True})
    raises("an empty input", lambda: run(strict, *empty))


def test_an_unsupported_device(plain_graphs: list[str]) -> None:
    model, calls = tiny("I8")
    call = tuple(value.to("meta") for value in calls[0])
    compiled = torch.compile(model.to("meta"), backend="moeca", options={"strict": True})
    raises("device meta is not supported", lambda: run(compiled, *call))


def test_autocast(plain_graphs: list[str], caplog: pytest.LogCaptureFixture) -> None:
    model, calls = tiny("I8")
    compiled = torch.compile(model, backend="moeca")
    with torch.autocast("cpu", torch.bfloat16):
        ran = run(compiled, *calls[0])
    assert ran.kind == ""
    assert ran.output.dtype == torch.bfloat16
    (line,) = lines(caplog)
    assert "autocast is on: cast the model instead" in line
    assert_fresh(run(compiled, *calls[1]), model, *calls[1])


def test_a_dispatch_that_cannot_be_replaced(
    plain_graphs: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = make("I1_capacity", depth=1)
    calls = trajectory(model, 4)
    compiled = torch.compile(model, backend="moeca")
    for call in calls:
        ran = run(compiled, *call)
        assert ran.kind == ""
        assert difference(ran.output, model, *call) <= 1e-5
    (line,) = lines(caplog)
    assert "blocks.0.moe: " in line
    assert "gives other values than the original" in line
    assert "slices.py" in line
    torch._dynamo.reset()
    strict = torch.compile(model, backend="moeca", options={"strict": True})
    raises("gives other values", lambda: [run(strict, *call) for call in calls[:2]])


class Untimed(nn.Module):
    """No timestep among the arguments: its features come from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make("I8", depth=1)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        h = self.inner.patch_embed(x).flatten(2).transpose(1, 2) + self.inner.pos
        for block in self.inner.blocks:
            h = block(h, features)
        return self.inner.finish(h, features)


def test_no_timestep_argument(plain_graphs: list[str], caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Untimed().eval()
    calls = [(x, torch.ones(2, 32)) for x, _, _ in trajectory(model.inner, 4, dx=0.05)]
    compiled = torch.compile(model, backend="moeca", options={"policy": "moeca"})
    for call in calls:
        assert_fresh(run(compiled, *call), model, *call)
    (line,) = lines(caplog)
    assert "no timestep among the tensor arguments ['x', 'features']" in line
    assert "every step is a refresh" in line
    with moeca_compile.generation(compiled):
        kinds = [run(compiled, *call).kind for call in calls]
    assert kinds == ["refresh", "reuse", "reuse", "reuse"]
    strict = torch.compile(model, backend="moeca", options={"strict": True})
    raises("no timestep among", lambda: run(strict, *calls[0]))


class Numbered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = make("I8", depth=1)

    def forward(self, x: Tensor, t: float, y: Tensor) -> Tensor:
        return self.inner(x, torch.full((x.shape[0],), t / 1000), y)


@pytest.mark.parametrize("kind", [int, float])
def test_a_python_number_as_timestep(
    plain_graphs: list[str], caplog: pytest.LogCaptureFixture, kind: type
) -> None:
    """Dynamo passes it as a graph input from the second value on: no entry for every timestep."""
    model = Numbered().eval()
    calls = [(x, kind(1000 * t[0]), y) for x, t, y in trajectory(model.inner, 5)]
    compiled = torch.compile(model, backend="moeca")
    plain_graphs.clear()
    for call in calls:
        assert difference(run(compiled, *call).output, model, *call) <= 1e-5
    assert plain_graphs == ["in the backend call"]
    assert "argument 't' is a Python number that changes: pass a tensor" in lines(caplog)[-1]
    assert len(lines(caplog)) == 2


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = make("I8", depth=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, level: int) -> Tensor:
        return self.inner(x, t, y) + level


@pytest.mark.slow
def test_a_number_that_never_repeats_does_not_compile_for_ever(
    plain_graphs: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeca_compile.backend.MAX_SHAPES", 2)
    model = Sized().eval()
    compiled = torch.compile(model, backend="moeca", options={"policy": "moeca"})
    x, t, y = trajectory(model.inner, 1)[0]
    plain_graphs.clear()
    kinds = []
    for level in (10, 11, 12, 13, 14, 11):
        ran = run(compiled, x, t, y, level)
        assert difference(ran.output, model, x, t, y, level) <= 1e-5
        kinds.append(ran.kind)
    assert kinds[:3] == ["refresh"] * 3
    assert kinds[3:5] == ["", ""]
    assert kinds[5] in ("refresh", "reuse")
    assert plain_graphs == ["later"]
    assert "sets of sizes" in lines(caplog)[-1]
