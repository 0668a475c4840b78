"""Conditioning opens lanes: other prompts, sizes and dtypes, told apart however they changed."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moeca_compile.runtime.session import SessionTracker
from runtime.schedules import euler
from runtime.tracking import LABELS, NULL, arguments, assert_one_generation, run


def test_changed_prompt_with_the_same_schedule_opens_a_lane() -> None:
    tracker = SessionTracker()
    run(tracker, euler(20), LABELS)
    other = run(tracker, euler(20), LABELS + 1)
    assert other[0].reason == "new_lane" and other[0].lane == 1
    assert_one_generation(other, 1)
    back = run(tracker, euler(5, seed=2), LABELS.clone())
    assert back[0].lane == 2 and back[0].reason == "new_lane", "lane 0 was done"


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_prompts_after_each_other_hold_no_more_lanes_than_one_of_them(
    guided: bool, shift: float
) -> None:
    tracker = SessionTracker()
    for prompt in range(12):
        for t, x in euler(20, seed=prompt, shift=shift):
            tracker.observe(t, (LABELS + prompt,), x)
            if guided:
                tracker.observe(t, (NULL,), x)
        assert len(tracker.live_lanes) == 1 + guided
    assert tracker.generations == 12


def test_rising_timesteps_tell_no_end_so_a_lane_is_done_when_long_unused() -> None:
    tracker = SessionTracker()
    for prompt in range(6):
        run(tracker, [(1 - t, x) for t, x in euler(40, seed=prompt)], LABELS + prompt)
        assert len(tracker.live_lanes) == min(prompt + 1, 2)


def test_lanes_of_an_ended_generation_are_taken_wherever_it_stopped() -> None:
    tracker = SessionTracker()
    for prompt in range(6):
        with tracker.generation():
            run(tracker, euler(20, seed=prompt)[:10], LABELS + prompt)
        assert len(tracker.live_lanes) == 1


def test_a_lane_in_the_middle_of_its_schedule_is_not_taken() -> None:
    """Guidance from the fifth step on, and prompts whose generations are called in turn."""
    tracker = SessionTracker()
    for number, call in enumerate(euler(20)):
        assert tracker.observe(*arguments(call, LABELS)).fresh == (number == 0)
        if number >= 5:
            assert tracker.observe(*arguments(call, NULL)).fresh == (number == 5)
    tracker = SessionTracker()
    loops = [euler(20, seed=prompt) for prompt in range(8)]
    for number in range(19 + 8):
        for prompt, loop in enumerate(loops):  # each starts a step after the one before
            if 0 <= number - prompt < 20:
                info = tracker.observe(*arguments(loop[number - prompt], LABELS + prompt))
                assert info.fresh == (number == prompt)


def test_prompt_changed_in_the_middle_never_reads_the_other_prompts_rows() -> None:
    tracker = SessionTracker()
    calls = euler(20)
    run(tracker, calls[:10], LABELS)
    assert run(tracker, calls[10:], LABELS + 1)[0].fresh


def test_conditioning_overwritten_in_place_is_another_lane() -> None:
    for labels in (LABELS.clone(), torch.randn(4, 700)):
        tracker = SessionTracker()
        calls = euler(20)
        run(tracker, calls[:2], labels)
        labels.add_(1)
        assert tracker.observe(*arguments(calls[2], labels)).reason == "new_lane"
        labels.sub_(1).add_(1)  # versions moved, values as in the lane just opened
        assert tracker.observe(*arguments(calls[3], labels)).reason == "continues"


def test_small_conditioning_changed_behind_torch_is_seen() -> None:
    labels = LABELS.clone()
    shared = labels.numpy()
    tracker = SessionTracker()
    run(tracker, euler(20)[:2], labels)
    shared[:] = 7
    assert tracker.observe(*arguments(euler(20)[2], labels)).reason == "new_lane"


def test_data_swapped_to_another_storage_is_seen() -> None:
    states = torch.randn(4, 700)
    tracker = SessionTracker()
    run(tracker, euler(20)[:2], states)
    version = states._version
    states.data = torch.randn(4, 700)
    assert states._version == version
    assert tracker.observe(*arguments(euler(20)[2], states)).reason == "new_lane"


def test_an_alias_with_its_own_version_counter_is_no_proof() -> None:
    states = torch.randn(4, 700)
    tracker = SessionTracker()
    run(tracker, euler(20)[:2], states.data)
    states.add_(1)
    assert states.data._version == 0
    assert tracker.observe(*arguments(euler(20)[2], states.data)).reason == "new_lane"


def test_recycled_addresses_do_not_alias() -> None:
    tracker = SessionTracker()
    calls, generator, lanes = euler(50), torch.Generator().manual_seed(0), []
    for call in calls:
        states = torch.randn(4, 700, generator=generator)  # freed and allocated again every time
        lanes.append(tracker.observe(*arguments(call, states)).lane)
        del states
        gc.collect(0)  # the youngest: all of the heap would take a second each
    assert lanes == list(range(50))


def test_equal_values_in_new_objects_are_the_same_lane() -> None:
    states = torch.randn(4, 700)
    tracker = SessionTracker()
    infos = [tracker.observe(*arguments(call, states.clone(), None, 7.5)) for call in euler(10)]
    assert_one_generation(infos)
    base = torch.cat([states, states])
    assert tracker.observe(*arguments(euler(10, seed=1)[0], base[:4], None, 7.5)).lane == 0


@pytest.mark.parametrize("states", [torch.arange(4), torch.randn(4, 700)])
def test_inference_tensors_are_compared_by_value(states: Tensor) -> None:
    with torch.inference_mode():
        tracker, given = SessionTracker(), states.clone()
        assert given.is_inference()
        infos = run(tracker, euler(20)[:3], given)
        assert_one_generation(infos)
        given.add_(1)  # leaves no trace but the values
        assert tracker.observe(*arguments(euler(20)[3], given)).reason == "new_lane"
    assert tracker.observe(*arguments(euler(20)[4], given)).reason == "continues"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (1, True),
        (1, 1.0),
        (None, 0),
        (7.5, 7.0),
        ("a", "b"),
        (torch.tensor([1]), 1),
        (torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32)),
        (torch.tensor([1, 2]), torch.tensor([[1, 2]])),
        (torch.empty(0), torch.empty(0, 3)),
        (torch.ones(2), None),
    ],
)
def test_conditioning_kinds_are_told_apart(before: object, after: object) -> None:
    tracker = SessionTracker()
    run(tracker, euler(20)[:2], before)
    assert tracker.observe(*arguments(euler(20)[2], before)).reason == "continues"
    assert tracker.observe(*arguments(euler(20)[3], after)).reason == "new_lane"
    assert tracker.observe(*arguments(euler(20)[3], before, before)).reason == "new_lane"


@pytest.mark.parametrize("value", [float("nan"), torch.tensor(float("nan")), object(), [1]])
def test_what_cannot_be_compared_never_matches(value: object) -> None:
    tracker = SessionTracker()
    assert all(i.reason == "new_lane" for i in run(tracker, euler(20), value))


def test_empty_conditioning_is_one_lane() -> None:
    tracker = SessionTracker()
    assert_one_generation([tracker.observe(t, (), x) for t, x in euler(20)])


@pytest.mark.parametrize(
    "change",
    [lambda x: x[:1], lambda x: x.double(), lambda x: torch.cat([x, x]), lambda x: x[..., :16]],
)
def test_changed_batch_dtype_or_size_is_another_lane(change: Callable[[Tensor], Tensor]) -> None:
    tracker = SessionTracker()
    calls = euler(20)
    for t, x in calls[:5]:
        tracker.observe(t, (None,), x)
    moved = tracker.observe(calls[5][0], (None,), change(calls[5][1]))
    assert (moved.reason, moved.lane) == ("new_lane", 1)
