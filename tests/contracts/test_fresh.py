"""Contract "fresh": a call whose identity or weights changed never reads old rows.

One compiled model for the module. Every test warms it up until a step is reused, changes one thing,
and expects what a model fresh from `reset` gives: a refresh, equal to eager.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import moeca_compile
from contracts.generations import Call, assert_fresh, assert_reused, run
from graph_runs import compile_model, only_entry
from idioms import make, trajectory
from idioms.denoiser import Denoiser

Shared = tuple[Denoiser, Callable[..., object], list[Call]]


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled() -> Iterator[None]:
    """Instead of after every test: the compiled model is shared."""
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def compiled_once(graph_level: None) -> Shared:
    model = make("I1", depth=1)
    calls = trajectory(model, 8, dx=0.05)
    return model, compile_model(model, calls[0], interval=8), calls


@pytest.fixture
def warm(compiled_once: Shared) -> Iterator[Shared]:
    """Two calls into a generation, weights as made; `calls[2]` would be a reuse step."""
    model, compiled, calls = compiled_once
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    moeca_compile.reset(compiled)
    assert run(compiled, *calls[0]).kind == "refresh"
    assert_reused(run(compiled, *calls[1]), model, *calls[1])
    yield compiled_once
    model.load_state_dict(saved)


def test_without_a_change_the_next_call_reuses(warm: Shared) -> None:
    model, compiled, calls = warm
    for call in calls[2:]:
        assert_reused(run(compiled, *call), model, *call)


def test_a_new_generation(warm: Shared) -> None:
    model, compiled, calls = warm
    ran = run(compiled, *calls[0])
    assert_fresh(ran, model, *calls[0])
    assert ran.reason == "timestep_jumped_back"
    assert moeca_compile.stats(compiled).generations == 2
    assert_reused(run(compiled, *calls[1]), model, *calls[1])


def test_another_generation_further_down_the_schedule(warm: Shared) -> None:
    model, compiled, calls = warm
    other = trajectory(model, 8, seed=9)[4]
    assert_fresh(run(compiled, other[0], other[1], calls[0][2]), model, *other[:2], calls[0][2])


def test_another_lane_and_back(warm: Shared) -> None:
    model, compiled, calls = warm
    x, t, y = calls[2]
    other = (x, t, (y + 1) % 10)
    assert_fresh(run(compiled, *other), model, *other)
    assert_reused(run(compiled, *calls[2]), model, *calls[2])


def test_a_sample_that_loses_its_label(graph_level: None) -> None:
    """I4 routes unlabelled samples by their label alone; the next call is another lane."""
    model = make("I4", depth=1)
    calls = trajectory(model, 6, dx=0.05)
    compiled = compile_model(model, calls[0], interval=8)
    assert run(compiled, *calls[0]).kind == "refresh"
    assert_reused(run(compiled, *calls[1]), model, *calls[1])
    x, t, y = calls[2]
    swapped = (x, t, y.flip(0))
    assert_fresh(run(compiled, *swapped), model, *swapped)
    assert_reused(run(compiled, *calls[3]), model, *calls[3])


def test_guidance_in_two_calls_reuses_in_both_lanes(warm: Shared) -> None:
    model, compiled, calls = warm
    moeca_compile.reset(compiled)
    null = torch.full_like(calls[0][2], 10)
    kinds = {"labels": [], "null": []}
    for x, t, y in calls[:5]:
        kinds["labels"].append(run(compiled, x, t, y).kind)
        kinds["null"].append(run(compiled, x, t, null).kind)
    assert kinds == dict.fromkeys(kinds, ["refresh"] + ["reuse"] * 4)
    stats = moeca_compile.stats(compiled)
    assert (stats.lanes, stats.generations) == (2, 1)
    # rows of one lane are not those of the other: alone, each gives the same outputs
    together = [run(compiled, *calls[5]).output, run(compiled, *calls[5][:2], null).output]
    for labels, expected in zip((calls[0][2], null), together):
        moeca_compile.reset(compiled)
        alone = [run(compiled, x, t, labels).output for x, t, _ in calls[:6]]
        torch.testing.assert_close(alone[-1], expected, rtol=1e-6, atol=1e-6)


def edit_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.blocks[0].moe.experts[3].up.weight.mul_(1.5)


def replace_parameter(model: nn.Module) -> None:
    """What merging a LoRA into a layer does."""
    layer = model.blocks[0].attn.proj
    layer.weight = nn.Parameter(layer.weight + 0.3, requires_grad=False)


def replace_data(model: nn.Module) -> None:
    layer = model.blocks[0].attn.proj
    for _ in range(2):  # the second storage may be where the first was
        layer.weight.data = layer.weight.data + 0.3


def edit_buffer(model: nn.Module) -> None:
    model.t_embed.frequencies.mul_(1.1)


def load_state(model: nn.Module) -> None:
    model.load_state_dict(make("I1", depth=1, seed=5).state_dict())


def load_assigned(model: nn.Module) -> None:
    model.load_state_dict(make("I1", depth=1, seed=6).state_dict(), assign=True)


def to_half_and_back(model: nn.Module) -> None:
    model.to(torch.bfloat16).to(torch.float32)


EDITS = [
    edit_in_place,
    replace_parameter,
    replace_data,
    edit_buffer,
    load_state,
    load_assigned,
    to_half_and_back,
]


@pytest.mark.parametrize("next_call", [2, 0], ids=["between_steps", "between_generations"])
@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.__name__)
def test_weights_change(warm: Shared, edit: Callable[[nn.Module], None], next_call: int) -> None:
    model, compiled, calls = warm
    edit(model)
    ran = run(compiled, *calls[next_call])
    assert_fresh(ran, model, *calls[next_call])
    # the refresh took the new weights into its rows
    following = calls[next_call + 1]
    assert_reused(run(compiled, *following), model, *following)


def test_weights_change_reaches_every_lane(warm: Shared) -> None:
    model, compiled, calls = warm
    x, t, y = calls[1]
    other = (y + 1) % 10
    run(compiled, x, t, other)
    edit_in_place(model)
    assert_fresh(run(compiled, *calls[2]), model, *calls[2])
    assert_fresh(run(compiled, *calls[2][:2], other), model, *calls[2][:2], other)


def test_reset(warm: Shared) -> None:
    model, compiled, calls = warm
    moeca_compile.reset(compiled)
    assert moeca_compile.stats(compiled).steps == 0
    assert only_entry(compiled).store.nbytes == 0
    assert_fresh(run(compiled, *calls[2]), model, *calls[2])


def test_explicit_generation(warm: Shared) -> None:
    model, compiled, calls = warm
    with moeca_compile.generation(compiled):
        assert_fresh(run(compiled, *calls[2]), model, *calls[2])
        assert_reused(run(compiled, *calls[3]), model, *calls[3])
        # a timestep that goes back is a restart of the same generation here
        assert_reused(run(compiled, calls[4][0], calls[1][1], calls[4][2]), model, *calls[4])
    assert_fresh(run(compiled, *calls[5]), model, *calls[5])


def test_a_step_that_failed_leaves_no_rows(warm: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    model, compiled, calls = warm
    variants = only_entry(compiled).variants
    reuse = variants.get("reuse")

    def fail(*args: object) -> None:
        reuse(*args)  # rows are written by then
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(variants._compiled, "reuse", fail)
        with pytest.raises(KeyboardInterrupt):
            run(compiled, *calls[2])
    assert_fresh(run(compiled, *calls[3]), model, *calls[3])
    assert_reused(run(compiled, *calls[4]), model, *calls[4])


def test_nan_does_not_spread_into_later_steps(warm: Shared) -> None:
    model, compiled, calls = warm
    x, t, y = calls[2]
    broken = x.clone()
    broken[0, 0, 0, 0] = float("nan")
    ran = run(compiled, broken, t, y)
    with torch.no_grad():
        eager = model(broken, t, y)
    assert ran.kind == "refresh"
    assert eager.isnan().any()
    torch.testing.assert_close(ran.output, eager, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert_fresh(run(compiled, *calls[3]), model, *calls[3])
    assert_reused(run(compiled, *calls[4]), model, *calls[4])
    assert_fresh(run(compiled, *calls[0]), model, *calls[0])
    ran = run(compiled, x, torch.full_like(t, float("nan")), y)
    assert ran.kind == "refresh"
    assert ran.output.isnan().all()
    assert_fresh(run(compiled, *calls[4]), model, *calls[4])
