"""The entry point: options and mode through `torch.compile`, user errors, public controls."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import moeca_compile
import moeca_compile.lowering.variants as variants_module
from contracts.generations import run
from graph_runs import use_graph_level
from idioms import make, trajectory
from moeca_compile import Options, OptionsError
from moeca_compile.backend import moeca
from moeca_compile.runtime.registry import REGISTRY
from moeca_compile.torch_compat import backend_settings

MODEL = make("I8", depth=1, num_experts=4)
CALLS = trajectory(MODEL, 4, dx=0.05)


def ode(steps: int) -> list[tuple[torch.Tensor, ...]]:
    """Calls of a sampler that adds no noise: the sample moves on a line."""
    x, t, y = CALLS[0]
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    return [(x + 0.02 * i * way, t - 0.005 * i, y) for i in range(steps)]


@pytest.fixture(autouse=True)
def _graph_level(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    use_graph_level(monkeypatch)
    yield


def refused(options: Any) -> OptionsError:
    compiled = torch.compile(MODEL, backend="moeca", options=options)
    with pytest.raises(BackendCompilerFailed) as caught:
        run(compiled, *CALLS[0])
    error = caught.value.inner_exception
    assert isinstance(error, OptionsError)
    assert str(error) in str(caught.value), "the user reads the message"
    return error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"intervall": 4}, "unknown option 'intervall'; did you mean 'interval'?"),
        ({"interval": "4"}, "option interval: expected an integer >= 1, got '4' of type str"),
        ({"interval": 0}, "option interval: expected an integer >= 1, got 0"),
        ({"budget": 2.0}, "option budget: expected None or a number in (0, 1], got 2.0"),
        ({"score": "moca"}, "option score: unknown value 'moca'; did you mean 'moeca'?"),
        ({"strict": 1}, "option strict: expected True or False, got 1 of type int"),
        ({"timestep": "tt"}, "option timestep='tt': expected a tensor argument of the model"),
        ([("interval", 4)], "options: expected a mapping, Options or None, got list"),
    ],
)
def test_bad_options_are_refused(options: Any, message: str) -> None:
    assert message in str(refused(options))


def test_a_wrong_timestep_names_the_arguments() -> None:
    message = str(refused({"timestep": "time"}))
    assert "valid: t, x, y" in message
    assert "a Python number is no graph input" in message


def test_a_refused_option_leaves_the_model_usable() -> None:
    refused({"intervall": 4})
    compiled = torch.compile(MODEL, backend="moeca", options={"interval": 4})
    assert [run(compiled, *call).kind for call in CALLS[:2]] == ["refresh", "reuse"]


def test_a_named_timestep_is_used() -> None:
    class Odd(nn.Module):
        """Time enters without a wave and under no usual name."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = MODEL

        def forward(self, x: torch.Tensor, when: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            h = self.inner.patch_embed(x).flatten(2).transpose(1, 2) + self.inner.pos
            c = self.inner.y_embed(y) * when[:, None]
            for block in self.inner.blocks:
                h = block(h, c)
            return self.inner.finish(h, c)

    model = Odd().eval()
    options: dict[str, Any] = {"policy": "moeca", "timestep": "when"}
    compiled = torch.compile(model, backend="moeca", options=options)
    assert [run(compiled, *call).kind for call in CALLS] == ["refresh", *["reuse"] * 3]
    assert run(compiled, *CALLS[0]).reason == "timestep_jumped_back"


def test_the_default_skips_steps_and_stays_near() -> None:
    """policy "auto": three refreshes to know the slope, then whole steps are extrapolated."""
    compiled = torch.compile(MODEL, backend="moeca")
    for call in ode(12):
        with torch.no_grad():
            output, eager = compiled(*call), MODEL(*call)
        assert (output - eager).norm() / eager.norm() < 0.05
    stats = moeca_compile.stats(compiled)
    assert (stats.steps, stats.reuse_steps, stats.plain_steps) == (12, 0, 0)
    assert stats.skip_steps >= 5
    assert stats.speedup_flops > 1.5
    assert stats.reasons["history"] == 2


def test_options_as_an_object() -> None:
    compiled = torch.compile(MODEL, backend="moeca", options=Options(interval=2))  # type: ignore[arg-type]
    assert [run(compiled, *call).kind for call in CALLS] == ["refresh", "reuse"] * 2


def test_mode_reaches_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def record(gm: Any, inputs: Any, fake_mode: Any, config: dict[str, Any]) -> Any:
        seen.append(config)
        return gm

    monkeypatch.setattr(variants_module, "inductor", record)
    compiled = torch.compile(MODEL, backend="moeca", mode="max-autotune-no-cudagraphs")
    for call in ode(5):
        run(compiled, *call)
    assert moeca_compile.stats(compiled).skip_steps > 0
    assert len(seen) == 2, "refresh and skip"
    wanted = torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    assert wanted
    assert all(wanted.items() <= config.items() for config in seen)


def test_mode_and_options_exclude_each_other() -> None:
    with pytest.raises(RuntimeError, match="Either mode or options"):
        torch.compile(MODEL, backend="moeca", mode="reduce-overhead", options={"interval": 2})


@pytest.mark.parametrize(
    ("compile_it", "settings"),
    [
        (lambda m: torch.compile(m, backend="moeca"), {}),
        (
            lambda m: torch.compile(m, backend="moeca", options={"interval": 2}),
            {"options": {"interval": 2}},
        ),
        (
            lambda m: torch.compile(m.forward, backend=moeca, options={"interval": 3}),
            {"options": {"interval": 3}},
        ),
        (
            lambda m: torch.compile(m, backend="moeca", mode="max-autotune"),
            {"mode": "max-autotune"},
        ),
        (lambda m: torch.compile(m, backend="eager", options={"x": 1}), None),
        (lambda m: torch.compile(m), None),
        (lambda m: m, None),
    ],
)
def test_what_a_model_was_compiled_with(
    compile_it: Callable[[nn.Module], Any], settings: dict[str, Any] | None
) -> None:
    assert backend_settings(compile_it(nn.Linear(2, 2))) == settings


def test_a_method_and_a_model_compiled_in_place() -> None:
    for compile_it in (_in_place, _method):
        model = make("I8", depth=1, num_experts=4)
        compiled = compile_it(model)
        assert [run(compiled, *call).kind for call in CALLS] == ["refresh", "reuse"] * 2
        assert moeca_compile.stats(compiled).steps == 4
        moeca_compile.reset(compiled)
        assert moeca_compile.stats(model).steps == 0
        torch._dynamo.reset()


def _in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="moeca", options={"interval": 2})
    return model


def _method(model: nn.Module) -> Any:
    return torch.compile(model.forward, backend="moeca", options={"interval": 2})


class Pipeline:
    """What a library of pipelines has: no module, and a method that calls one."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.models = model, {"first": [model]}

    def denoise(self, *call: Tensor) -> Tensor:
        return self.model(*call)

    def from_a_list(self, *call: Tensor) -> Tensor:
        return self.models["first"][0](*call)


def _closure(model: nn.Module) -> Callable[..., Tensor]:
    return lambda *call: model(*call)


@pytest.mark.parametrize("name", ["I5", "I8"])
@pytest.mark.parametrize(
    "calling",
    [_closure, lambda model: Pipeline(model).denoise, lambda model: Pipeline(model).from_a_list],
    ids=["closure", "attribute", "item"],
)
def test_a_compiled_function_is_about_the_model_it_calls(calling: Any, name: str) -> None:
    """Whether its dispatch had to be captured (I8) or not (I5)."""
    model = make(name, depth=1, num_experts=4)
    compiled = torch.compile(calling(model), backend="moeca", options={"interval": 2})
    with torch.no_grad():
        compiled(*CALLS[0])
        moeca_compile.reset(model)
        with moeca_compile.generation(model):
            for call in CALLS:
                compiled(*call)
    stats = moeca_compile.stats(model)
    assert (stats.steps, stats.refresh_steps, stats.reuse_steps) == (4, 2, 2)
    assert re.match(r"models?\b.*\.blocks\.0\.moe", stats.layers[0].name)


def test_two_models_in_one_compiled_function_share_an_entry_of_nobody() -> None:
    models = [make("I5", depth=1, num_experts=4) for _ in range(2)]
    compiled = torch.compile(
        lambda *call: models[0](*call) + models[1](*call), backend="moeca", options={"interval": 2}
    )
    with torch.no_grad():
        for call in CALLS:
            assert torch.isfinite(compiled(*call)).all()
    assert [moeca_compile.stats(model).steps for model in models] == [0, 0]
    assert len(REGISTRY.orphans) == 1


def test_other_backends_see_the_model_as_it_is() -> None:
    model = make("I1", depth=1, num_experts=4)
    compiled = torch.compile(model, backend="moeca", options={"policy": "moeca"})
    for call in CALLS[:3]:
        kind = run(compiled, *call).kind
    assert kind == "reuse"
    graphs: list[torch.fx.GraphModule] = []

    def other(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    elsewhere = torch.compile(model, backend=other)
    with torch.no_grad():
        torch.testing.assert_close(elsewhere(*CALLS[3]), model(*CALLS[3]))
    assert len(graphs) > 1, "its dispatch breaks the graph for others, as ever"
    assert not any("moeca" in str(node.target) for gm in graphs for node in gm.graph.nodes)
    # Dynamo gives up on frames for every backend, but not on the captured model's own
    kinds = [run(compiled, *call).kind for call in CALLS]
    assert kinds == ["refresh", "reuse", "reuse", "reuse"]
