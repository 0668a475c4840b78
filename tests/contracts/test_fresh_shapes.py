"""Contract "fresh", where Dynamo compiles again: batch size, resolution, dtype, grad mode, models.

Each call at another shape is a refresh of an entry of its own, and so is the first one back.
"""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moeca_compile
from contracts.generations import assert_fresh, assert_reused, grown, run
from graph_runs import compile_model
from idioms import make, trajectory
from moeca_compile.backend import moeca
from moeca_compile.runtime.registry import REGISTRY

ROWS: dict[str, Any] = {"policy": "moeca"}


@pytest.mark.parametrize(
    "dynamic", [None, pytest.param(False, marks=pytest.mark.slow)], ids=["dynamic", "static"]
)
def test_batch_size_changes_and_comes_back(graph_level: None, dynamic: bool | None) -> None:
    model = make("I1", depth=1, num_experts=4)
    calls = trajectory(model, 8, dx=0.05)
    moeca_compile.prepare(model, *calls[0])
    compiled = torch.compile(model, backend=moeca, options=ROWS, fullgraph=True, dynamic=dynamic)
    assert_fresh(run(compiled, *calls[0]), model, *calls[0])
    assert_reused(run(compiled, *calls[1]), model, *calls[1])
    assert_fresh(run(compiled, *grown(calls[2])), model, *grown(calls[2]))
    assert_reused(run(compiled, *grown(calls[3])), model, *grown(calls[3]))
    assert_fresh(run(compiled, *calls[4]), model, *calls[4])
    assert_reused(run(compiled, *calls[5]), model, *calls[5])
    # rows of the larger batch are there, but steps have passed since
    ran = run(compiled, *grown(calls[6]))
    assert_fresh(ran, model, *grown(calls[6]))
    assert ran.reason == "steps_at_other_shapes"


class AnySize(nn.Module):
    """Condition tokens of any number in front of the image tokens; t and cond are keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.base = make("I8", depth=1, num_experts=4)
        self.into = nn.Linear(12, 32)

    def forward(self, x: Tensor, *, t: Tensor, cond: Tensor) -> Tensor:
        c = self.base.t_embed(t)
        h = torch.cat([cond, self.into(F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2))], 1)
        for block in self.base.blocks:
            h = block(h, c)
        out = self.base.head(h[:, cond.shape[1] :]).transpose(1, 2)
        return F.pixel_shuffle(out.unflatten(2, (x.shape[2] // 2, -1)), 2)


@pytest.mark.slow
def test_guidance_with_texts_of_different_length_reuses_in_both(graph_level: None) -> None:
    torch.manual_seed(0)
    model = AnySize().eval()
    compiled = torch.compile(model, backend=moeca, options={"policy": "moeca"}, dynamic=False)
    x, texts = torch.randn(2, 3, 8, 8), (torch.randn(2, 5, 32), torch.randn(2, 3, 32))
    kinds = []
    for step in range(4):
        for cond in texts:
            t = torch.full((2,), 0.9 - 0.1 * step)
            with torch.no_grad():
                before = moeca_compile.stats(compiled).reuse_steps
                compiled(x, t=t, cond=cond)
            kinds.append(moeca_compile.stats(compiled).reuse_steps - before)
        x = x + 0.05 * torch.randn(x.shape)
    assert kinds == [0, 0, 1, 1, 1, 1, 1, 1]


def test_resolution_changes(graph_level: None) -> None:
    torch.manual_seed(0)
    model = AnySize().eval()
    compiled = torch.compile(model, backend=moeca, options={"policy": "moeca"})
    cond = torch.randn(1, 4, 32)
    for side in (8, 12, 8):
        x = torch.randn(1, 3, side, side)
        for step, expected in enumerate(("refresh", "reuse")):
            t = torch.full((1,), 0.9 - 0.1 * step)
            before = moeca_compile.stats(compiled)
            with torch.no_grad():
                output, eager = compiled(x, t=t, cond=cond), model(x, t=t, cond=cond)
            now = moeca_compile.stats(compiled)
            assert getattr(now, f"{expected}_steps") > getattr(before, f"{expected}_steps")
            if expected == "refresh":
                torch.testing.assert_close(output, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_dtype_and_grad_mode_change(graph_level: None) -> None:
    model = make("I8", depth=1, num_experts=4)
    calls = trajectory(model, 8, dx=0.05)
    compiled = compile_model(model, calls[0], interval=8)
    assert_fresh(run(compiled, *calls[0]), model, *calls[0])
    assert_reused(run(compiled, *calls[1]), model, *calls[1])
    with torch.inference_mode():  # Dynamo's guards tell it from no_grad: an entry of its own
        before = moeca_compile.stats(compiled)
        outputs = [compiled(*call) for call in calls[2:4]]
        torch.testing.assert_close(outputs[0], model(*calls[2]), rtol=1e-5, atol=1e-5)
    now = moeca_compile.stats(compiled)
    assert now.refresh_steps == before.refresh_steps + 1
    assert now.reuse_steps == before.reuse_steps + 1
    assert_fresh(run(compiled, *calls[4]), model, *calls[4])
    assert_reused(run(compiled, *calls[5]), model, *calls[5])
    model.to(torch.bfloat16)
    x, t, y = calls[6]
    narrow = (x.bfloat16(), t, y)
    assert_fresh(run(compiled, *narrow), model, *narrow, tolerance=2e-2)
    model.to(torch.float32)
    assert_fresh(run(compiled, *calls[7]), model, *calls[7])


@pytest.mark.slow
@pytest.mark.parametrize("idiom", ["I1", "I8"])
def test_models_of_one_class_keep_their_rows_and_counts(graph_level: None, idiom: str) -> None:
    models = [make(idiom, depth=1, num_experts=4, seed=seed) for seed in (0, 1)]
    models.append(copy.deepcopy(models[0]))
    calls = trajectory(models[0], 3, dx=0.05)
    compiled = [compile_model(model, calls[0], policy="moeca") for model in models]
    for call, check in zip(calls, (assert_fresh, assert_reused, assert_reused)):
        for each, model in zip(compiled, models):
            check(run(each, *call), model, *call)
    for each in compiled:
        stats = moeca_compile.stats(each)
        assert (stats.steps, stats.refresh_steps, stats.reuse_steps) == (3, 1, 2)
    moeca_compile.reset(compiled[0])
    assert [moeca_compile.stats(each).steps for each in compiled] == [0, 3, 3]


@pytest.mark.slow
def test_a_copy_of_a_captured_model_has_weights_of_its_own(graph_level: None) -> None:
    model = make("split", depth=1, num_experts=4)
    calls = trajectory(model, 3, dx=0.05)
    compiled = compile_model(model, calls[0], policy="moeca")
    run(compiled, *calls[0])
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.weight.mul_(2)
    other_compiled = torch.compile(other, backend=moeca, fullgraph=True)
    assert_fresh(run(other_compiled, *calls[1]), other, *calls[1])
    assert_reused(run(compiled, *calls[1]), model, *calls[1])


@pytest.mark.slow
def test_one_model_compiled_twice_keeps_options_apart(graph_level: None) -> None:
    model = make("I1", depth=1, num_experts=4)
    calls = trajectory(model, 5, dx=0.05)
    every_other = compile_model(model, calls[0], interval=2)
    never = compile_model(model, calls[0], interval=8)
    kinds = [(run(every_other, *call).kind, run(never, *call).kind) for call in calls]
    refresh, reuse = "refresh", "reuse"
    assert [a for a, _ in kinds] == [refresh, reuse, refresh, reuse, refresh]
    assert [b for _, b in kinds] == [refresh, reuse, reuse, reuse, reuse]
    assert moeca_compile.stats(every_other).refresh_steps == 3
    assert moeca_compile.stats(never).refresh_steps == 1
    assert moeca_compile.stats(model).refresh_steps == 4, "a plain module stands for both"
    with moeca_compile.generation(never):
        assert run(every_other, *calls[4]).kind == reuse
        assert run(never, *calls[4]).reason == "generation_started"
        with pytest.raises(moeca_compile.MoecaError, match="one"), moeca_compile.generation(model):
            pass
    moeca_compile.reset(never)
    assert moeca_compile.stats(never).steps == 0
    assert moeca_compile.stats(every_other).steps == 6


def test_dynamo_reset_starts_over(graph_level: None) -> None:
    model = make("I8", depth=1, num_experts=4)
    calls = trajectory(model, 3, dx=0.05)
    compiled = compile_model(model, calls[0])
    run(compiled, *calls[0])
    torch._dynamo.reset()
    assert moeca_compile.stats(compiled).steps == 0
    ran = run(compiled, *calls[1])
    assert_fresh(ran, model, *calls[1])
    assert ran.reason == "new_lane"


@pytest.mark.slow
@pytest.mark.parametrize("idiom", ["I1", "I8"])
def test_a_deleted_model_leaves_no_weights_and_no_rows(graph_level: None, idiom: str) -> None:
    model = make(idiom, depth=1, num_experts=4)
    calls = trajectory(model, 3, dx=0.05)
    compiled = compile_model(model, calls[0], policy="moeca")
    for call in (*calls[:2], grown(calls[2])):  # a dynamic graph too
        run(compiled, *call)
    entries = REGISTRY.entries_of(compiled)
    assert len(entries) == 2
    assert all(entry.store.nbytes for entry in entries)
    alive = [weakref.ref(model), *(weakref.ref(p) for p in model.parameters())]
    del model, compiled
    gc.collect()
    assert [ref() for ref in alive if ref() is not None] == []
    assert [entry.store.nbytes for entry in entries] == [0, 0]
