"""Several lanes and generations at once, and what the caller says of them."""

from __future__ import annotations

import pytest
import torch

from moeca_compile.errors import SessionError
from moeca_compile.runtime.session import SessionTracker
from runtime.schedules import euler, flow, noise
from runtime.tracking import LABELS, NULL, arguments, assert_one_generation, run


def test_lanes_are_bounded_and_the_oldest_is_evicted() -> None:
    evicted: list[int] = []
    tracker = SessionTracker(max_lanes=3, on_evict=evicted.append)
    calls = euler(20)
    for label in (0, 1, 2, 0, 3, 1):  # 1 is the oldest when 3 comes; it comes back as lane 4
        tracker.observe(*arguments(calls[0], label))
    assert evicted == [1, 2] and tracker.live_lanes == (4, 3, 0) and tracker.lanes == 5
    tracker.reset()
    assert evicted == [1, 2, 0, 3, 4] and tracker.live_lanes == ()
    assert (tracker.generations, tracker.lanes) == (0, 0)
    info = tracker.observe(*arguments(calls[1], 0))
    assert (info.lane, info.generation, info.reason) == (5, 0, "new_lane")
    assert (tracker.generations, tracker.lanes) == (1, 1)


def test_invalidate_refreshes_each_lane_once() -> None:
    tracker = SessionTracker()
    calls = euler(20)
    for call in calls[:3]:
        for label in (0, 1):
            tracker.observe(*arguments(call, label))
    tracker.invalidate("weights_changed")
    for label in (0, 1):
        info = tracker.observe(*arguments(calls[3], label))
        assert (info.fresh, info.reason, info.generation) == (True, "weights_changed", 0)
    tracker.invalidate("step_failed", lane=1)
    assert not tracker.observe(*arguments(calls[4], 0)).fresh
    assert tracker.observe(*arguments(calls[4], 1)).reason == "step_failed"
    assert not tracker.observe(*arguments(calls[5], 1)).fresh


def test_explicit_generation_starts_anew_and_ignores_jumps() -> None:
    tracker = SessionTracker()
    calls = euler(20)
    run(tracker, calls[:5])
    with tracker.generation():
        first = tracker.observe(*arguments(calls[5], LABELS))
        assert (first.reason, first.generation) == ("generation_started", 1)
        assert tracker.observe(*arguments(calls[5], NULL)).generation == 1
        for number in (6, 7, 6, 5, 6, 6, 12):
            info = tracker.observe(*arguments(calls[number], LABELS))
            assert not info.fresh and info.generation == 1
        assert info.step == 6  # one of the seven calls repeated its timestep
        assert not tracker.observe(None, (LABELS,), calls[12][1]).fresh
    after = tracker.observe(*arguments(calls[13], LABELS))
    assert (after.reason, after.generation) == ("generation_ended", 2)


def test_inside_an_explicit_generation_a_foreign_sample_still_refreshes() -> None:
    tracker = SessionTracker()
    with tracker.generation():
        run(tracker, euler(20)[:5])
        info = tracker.observe(0.7, (LABELS,), flow(0.7, 5))
        assert (info.fresh, info.reason, info.generation) == (True, "sample_changed", 0)
        near = flow(0.68, 5)
        assert not tracker.observe(0.68, (LABELS,), near).fresh
        assert tracker.observe(torch.tensor([0.6, 0.5]), (LABELS,), near).fresh
        assert tracker.observe(0.6, (LABELS,), near).fresh  # the last timestep was no timestep


def test_explicit_control_in_the_wrong_order_is_an_error() -> None:
    tracker = SessionTracker()
    with pytest.raises(SessionError, match="found none"):
        tracker.end_generation()
    tracker.begin_generation()
    with pytest.raises(SessionError, match="found one"):
        tracker.begin_generation()
    tracker.end_generation()
    with pytest.raises(ZeroDivisionError), tracker.generation():
        _ = 1 / 0
    with tracker.generation():
        pass


def test_two_generations_interleaved_on_their_own_conditioning() -> None:
    tracker = SessionTracker()
    a, b = [], []
    for first, second in zip(euler(20, seed=0), euler(20, seed=1)):
        a.append(tracker.observe(*arguments(first, 0)))
        b.append(tracker.observe(*arguments(second, 1)))
    assert_one_generation(a, 0)
    assert_one_generation(b, 1)


def test_two_generations_sharing_a_conditioning_never_share_rows() -> None:
    tracker = SessionTracker()
    for first, second in zip(euler(20, seed=0), euler(20, seed=1)):
        assert tracker.observe(*arguments(first, NULL)).fresh
        assert tracker.observe(*arguments(second, NULL)).fresh


def test_infinite_loop_of_one_step_generations() -> None:
    tracker = SessionTracker()
    infos = [tracker.observe(1.0, (LABELS,), noise(seed)) for seed in range(5)]
    assert [i.generation for i in infos] == [0, 1, 2, 3, 4]
    assert all(i.fresh and i.step == 0 for i in infos)
