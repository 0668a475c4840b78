"""Contract "bounded": no row older than interval - 1 steps; bytes known before allocation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import moeca_compile
from contracts.generations import Call, assert_fresh, run
from graph_runs import compile_model, only_entry
from idioms import make, trajectory
from idioms.denoiser import Denoiser
from moeca_compile.runtime.controller import Controller

Shared = tuple[Denoiser, Callable[..., object], list[Call]]
STEPS = 13


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled() -> Iterator[None]:
    """Instead of after every test: the compiled model is shared."""
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def compiled_once(graph_level: None) -> Shared:
    model = make("I1", depth=2, num_experts=4)
    calls = trajectory(model, STEPS, dx=0.03)
    compiled = compile_model(model, calls[0], interval=4)
    run(compiled, *calls[0])
    return model, compiled, calls


def ages(kinds: list[str]) -> list[int]:
    """Steps since the last refresh, per step."""
    found: list[int] = []
    for kind in kinds:
        found.append(0 if kind == "refresh" else found[-1] + 1)
    return found


@pytest.mark.parametrize("interval", [2, 3, 4, 5, 13, 100])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_no_row_outlives_its_interval(
    compiled_once: Shared, monkeypatch: pytest.MonkeyPatch, interval: int, warmup: int
) -> None:
    _, compiled, calls = compiled_once
    entry = only_entry(compiled)
    options = moeca_compile.Options(interval=interval, warmup_steps=warmup)
    monkeypatch.setattr(entry, "controller", Controller(options))  # graphs depend on neither
    moeca_compile.reset(compiled)
    null = torch.full_like(calls[0][2], 10)
    kinds: tuple[list[str], list[str]] = ([], [])
    for x, t, y in calls:
        for lane, labels in enumerate((y, null)):
            kinds[lane].append(run(compiled, x, t, labels).kind)
    assert kinds[0] == kinds[1]
    assert kinds[0][: max(1, warmup)] == ["refresh"] * max(1, warmup)
    after = kinds[0][max(0, warmup - 1) :]  # from the last forced refresh on: the plain pattern
    assert after == ["reuse" if i % interval else "refresh" for i in range(len(after))]
    assert max(ages(kinds[0])) <= interval - 1


def test_lanes_that_miss_calls_age_by_their_own_calls(compiled_once: Shared) -> None:
    _, compiled, calls = compiled_once
    moeca_compile.reset(compiled)
    other = (calls[0][2] + 1) % 10
    kinds: list[str] = []
    for step, (x, t, y) in enumerate(calls):
        run(compiled, x, t, y)
        if step % 2 == 0:
            kinds.append(run(compiled, x, t, other).kind)
    assert max(ages(kinds)) <= 3


def test_bytes_are_known_before_they_are_allocated(compiled_once: Shared) -> None:
    model, compiled, calls = compiled_once
    moeca_compile.reset(compiled)
    entry = only_entry(compiled)
    layout = entry.variants.analysis.plan.layout
    planned = layout.nbytes
    assert moeca_compile.explain(compiled, *calls[0]).cache_bytes == planned
    assert entry.cache_bytes == planned
    assert moeca_compile.stats(compiled).cache_bytes == 0, "nothing is allocated yet"
    for lanes, labels in enumerate((0, 1, 2), start=1):
        run(compiled, *calls[0][:2], torch.full_like(calls[0][2], labels))
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for lane in entry.store.lanes
            for tensor in entry.store.tensors(lane).values()
        }
        assert moeca_compile.stats(compiled).cache_bytes == lanes * planned
        assert sum(storages.values()) == lanes * planned
    assert sum(layout.nbytes_by_kind().values()) == planned


def test_rows_stay_where_they_are(compiled_once: Shared) -> None:
    _, compiled, calls = compiled_once
    moeca_compile.reset(compiled)
    entry = only_entry(compiled)
    addresses = []
    for call in calls:
        run(compiled, *call)
        (lane,) = entry.store.lanes
        addresses.append([t.data_ptr() for t in entry.store.tensors(lane).values()])
    assert all(each == addresses[0] for each in addresses)


def test_prompts_after_each_other_use_the_same_rows(compiled_once: Shared) -> None:
    """What a prompt's generation gives does not depend on the one before, whose rows it takes."""
    model, compiled, calls = compiled_once
    moeca_compile.reset(compiled)
    entry = only_entry(compiled)
    start = calls[0][1]
    calls = [(x, start * (1 - i / STEPS), y) for i, (x, _, y) in enumerate(calls)]  # ends at zero
    addresses, outputs = [], []
    for prompt in range(3):
        for number, (x, t, y) in enumerate(calls):
            ran = run(compiled, x, t, (y + prompt) % 10)
            if number == 0:
                assert_fresh(ran, model, x, t, (y + prompt) % 10)
        outputs.append(ran.output)
        (lane,) = entry.store.lanes
        addresses.append([t.data_ptr() for t in entry.store.tensors(lane).values()])
        stats = moeca_compile.stats(compiled)
        assert stats.cache_bytes == entry.cache_bytes and stats.lanes == prompt + 1
    assert addresses[1] == addresses[0] and addresses[2] == addresses[0]
    for prompt, expected in enumerate(outputs):
        moeca_compile.reset(compiled)
        for x, t, y in calls:
            alone = run(compiled, x, t, (y + prompt) % 10)
        assert torch.equal(alone.output, expected)


def test_lanes_are_bounded_and_evicted_ones_freed(compiled_once: Shared) -> None:
    _, compiled, calls = compiled_once
    moeca_compile.reset(compiled)
    entry = only_entry(compiled)
    x, t, _ = calls[0]
    for a in range(11):
        run(compiled, x, t, torch.tensor([a, (a + 1) % 11]))
    assert len(entry.store.lanes) == 8
    assert moeca_compile.stats(compiled).cache_bytes == 8 * entry.cache_bytes


def test_explain_counts_the_rows_of_the_options_it_was_compiled_with(graph_level: None) -> None:
    model = make("I8", depth=1)
    calls = trajectory(model, 1)
    compiled = compile_model(model, calls[0], score="moeca")
    run(compiled, *calls[0])
    told = moeca_compile.explain(compiled, *calls[0]).cache_bytes
    assert told == moeca_compile.stats(compiled).cache_bytes
    drifting = compile_model(model, calls[0], score="input_drift")
    assert told < moeca_compile.explain(drifting, *calls[0]).cache_bytes, "no drift is tracked"
