"""Random interleavings of generations against an oracle that knows who made each call.

Safety: a call that may read rows was preceded, in its lane, by a call of the same generation and
the same conditioning. Calm: a generation nobody disturbs is fresh at its first call only.
Seeds are in the test names.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from moeca_compile.runtime.session import SessionTracker
from runtime.schedules import Call, ddim, euler, flow, heun, karras

Event = tuple[int, int, int, float, Tensor]  # generation, position, conditioning, t, sample


def _loop(rng: random.Random, seed: int) -> list[Call]:
    steps = rng.choice([10, 12, 20, 30])
    makers = (
        lambda: euler(steps, seed),
        lambda: euler(steps, seed, shift=3.0),
        lambda: euler(steps, seed, start=rng.choice([0.3, 0.6, 0.8])),
        lambda: heun(steps, seed),
        lambda: karras(max(steps, 16), seed),
        lambda: ddim(steps, seed),
        lambda: [(1 - t, x) for t, x in euler(steps, seed)],
    )
    calls = rng.choice(makers)()
    return calls[: rng.randint(1, len(calls))] if rng.random() < 0.4 else calls


def _conditioning(label: int, large: bool) -> Tensor:
    # Either kind is a new object at every call; large ones take the identity path.
    return torch.full((1200 if large else 3,), label)


def _streams(rng: random.Random, shared: bool) -> list[list[Event]]:
    """Streams to be interleaved; within a stream generations follow each other. With `shared`
    streams may use each other's conditioning."""
    seeds = iter(range(10_000))
    streams = []
    for number in range(rng.randint(1, 3)):
        stream: list[Event] = []
        for _ in range(rng.randint(1, 4)):
            generation = next(seeds) * 10 + number
            conditional = rng.randint(0, 2) if shared else 10 * number + rng.randint(0, 1)
            guided = rng.random() < 0.5
            null = 99 if shared else 10 * number + 9
            for position, (t, x) in enumerate(_loop(rng, rng.randint(0, 10**6))):
                labels = [conditional, null] if guided else [conditional]
                rng.shuffle(labels)
                stream += [(generation, position, label, t, x) for label in labels]
        streams.append(stream)
    return streams


def _interleave(rng: random.Random, streams: list[list[Event]]) -> list[Event]:
    queues, merged = [list(s) for s in streams], []
    while any(queues):
        queue = rng.choice([q for q in queues if q])
        merged += [queue.pop(0) for _ in range(min(len(queue), rng.choice([1, 1, 2, 5])))]
    return merged


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("seed", range(40))
def test_no_interleaving_reads_another_generations_rows(seed: int, shared: bool) -> None:
    rng = random.Random(seed)
    max_lanes = rng.choice([2, 8, 16])
    alive: set[int] = set()
    tracker = SessionTracker(max_lanes, on_evict=alive.remove)
    last_in_lane: dict[int, tuple[int, int, int]] = {}
    for generation, position, label, t, x in _interleave(rng, _streams(rng, shared)):
        info = tracker.observe(t, (_conditioning(label, label % 2 == 0),), x)
        alive.add(info.lane)
        assert len(alive) <= max_lanes and set(tracker.live_lanes) == alive
        if not info.fresh:
            before = last_in_lane[info.lane]
            assert before[:2] == (generation, label), f"wrong reuse: {info}, after {before}"
            assert position == before[2] + 1
        last_in_lane[info.lane] = (generation, label, position)


@pytest.mark.parametrize("seed", range(40))
def test_undisturbed_generations_are_fresh_once(seed: int) -> None:
    rng = random.Random(seed)
    tracker = SessionTracker(max_lanes=16)
    events = _interleave(rng, _streams(rng, shared=False))
    fresh: dict[tuple[int, int], int] = {}
    for generation, _, label, t, x in events:
        info = tracker.observe(t, (_conditioning(label, label % 2 == 0),), x)
        fresh[generation, label] = fresh.get((generation, label), 0) + info.fresh
    assert set(fresh.values()) == {1}
    assert tracker.generations == len({generation for generation, *_ in events})


@pytest.mark.parametrize("seed", range(40))
def test_stopped_early_then_another_start_anywhere(seed: int) -> None:
    rng = random.Random(1000 + seed)
    tracker = SessionTracker()
    calls = euler(rng.choice([10, 20, 50]), seed)
    stop = rng.randint(1, len(calls))
    for t, x in calls[:stop]:
        tracker.observe(t, (1,), x)
    t = rng.uniform(0.05, 1.0)
    assert tracker.observe(t, (1,), flow(t, seed + 500)).fresh
