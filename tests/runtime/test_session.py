"""The tracker on real sampling loops: one generation each, and every way to end up in another."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moeca_compile.errors import SessionError
from moeca_compile.runtime.session import SessionTracker, StepInfo
from runtime.schedules import BATCH, Call, ancestral, ddim, euler, flow, heun, karras, noise

LABELS, NULL = torch.tensor([3, 5]), torch.tensor([10, 10])


def run(tracker: SessionTracker, calls: list[Call], *conditioning: object) -> list[StepInfo]:
    given = conditioning or (LABELS,)
    return [tracker.observe(t, given, x) for t, x in calls]


def assert_one_generation(infos: list[StepInfo], number: int = 0) -> None:
    assert infos[0].fresh and infos[0].new_generation
    assert {i.generation for i in infos} == {number}
    stopped = [(i.step, i.reason) for i in infos[1:] if i.fresh]
    assert not stopped


SAMPLERS = {
    "euler20": lambda seed: euler(20, seed),
    "euler50": lambda seed: euler(50, seed),
    "euler10": lambda seed: euler(10, seed),
    "euler8": lambda seed: euler(8, seed),
    "shift3": lambda seed: euler(20, seed, shift=3.0),
    "shift12": lambda seed: euler(20, seed, shift=12.0),
    "rising": lambda seed: [(1 - t, x) for t, x in euler(20, seed)],
    "img2img": lambda seed: euler(10, seed, start=0.5),
    "heun20": lambda seed: heun(20, seed),
    "karras20": lambda seed: karras(20, seed),
    "sigma20": lambda seed: [(math.exp(4 * t), x) for t, x in karras(20, seed)],
    "rising img2img": lambda seed: [(1 - t, x) for t, x in euler(10, seed, start=0.5)],
    "ddim20": lambda seed: ddim(20, seed),
    "ddim50": lambda seed: ddim(50, seed),
    "karras12": lambda seed: karras(12, seed),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_is_one_generation_and_the_next_run_another(name: str) -> None:
    tracker = SessionTracker()
    for seed in range(4):
        assert_one_generation(run(tracker, SAMPLERS[name](seed)), seed)
    assert (tracker.generations, tracker.lanes) == (4, 1)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("null_first", [False, True])
def test_two_call_guidance_is_two_lanes_of_one_generation(name: str, null_first: bool) -> None:
    tracker = SessionTracker()
    for seed in range(3):
        lanes: dict[int, list[StepInfo]] = {}
        for number, (t, x) in enumerate(SAMPLERS[name](seed)):
            order = (NULL, LABELS) if null_first ^ (number % 3 == 2) else (LABELS, NULL)
            for condition in order:
                info = tracker.observe(t, (condition,), x)
                lanes.setdefault(info.lane, []).append(info)
        assert len(lanes) == 2
        for infos in lanes.values():
            assert_one_generation(infos, seed)
    assert tracker.generations == 3


@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_in_one_doubled_batch_is_one_lane(name: str) -> None:
    """Half of the rows have no label; each half of the sample is the same."""
    tracker = SessionTracker()
    both = torch.cat([LABELS, NULL])
    for seed in range(2):
        calls = [(t, torch.cat([x, x])) for t, x in SAMPLERS[name](seed)]
        assert_one_generation(run(tracker, calls, both), seed)
    assert (tracker.generations, tracker.lanes) == (2, 1)


def test_steps_count_within_a_generation_and_heun_repeats_one() -> None:
    tracker = SessionTracker()
    assert [i.step for i in run(tracker, euler(4))] == [0, 1, 2, 3]
    infos = run(tracker, heun(4, seed=1))
    assert [i.step for i in infos] == [0, 1, 1, 2, 2, 3, 3]
    assert [i.reason for i in infos[1:4]] == ["continues", "same_step", "continues"]


@pytest.mark.parametrize(("stop", "start"), [(s, t) for s in (1, 5, 14) for t in (1.0, 0.8, 0.5)])
def test_new_noise_at_the_same_or_a_lower_timestep_is_a_new_generation(
    stop: int, start: float
) -> None:
    for seed in range(1, 6):
        tracker = SessionTracker()
        ended = run(tracker, euler(20)[:stop])[-1].timestep
        assert ended is not None
        info = tracker.observe(ended * start, (LABELS,), flow(ended * start, seed))
        assert info.fresh and info.new_generation and info.generation == 1 and info.step == 0
        assert info.reason == "sample_changed"


def test_new_image_near_the_clean_end_is_a_new_generation() -> None:
    for seed in range(1, 9):
        tracker = SessionTracker()
        run(tracker, euler(20))
        info = tracker.observe(0.04, (LABELS,), flow(0.04, seed))
        assert info.fresh and info.new_generation


def test_wide_steps_refresh_unless_the_caller_vouches_for_the_generation() -> None:
    tracker = SessionTracker()
    infos = run(tracker, ancestral(20))
    wide = [i for i in infos[1:] if i.fresh]
    assert wide and {i.reason for i in wide} == {"sample_unclear"}
    assert {i.generation for i in infos} == {0} and [i.step for i in infos] == list(range(20))
    with tracker.generation():
        assert_one_generation(run(tracker, ancestral(20, seed=1)), 1)


def test_a_far_sample_at_the_same_timestep_is_a_new_generation_even_after_one_call() -> None:
    tracker = SessionTracker()
    tracker.observe(0.3, (LABELS,), noise(0))
    info = tracker.observe(0.3, (LABELS,), noise(0) + 0.8 * noise(1))
    assert (info.fresh, info.reason, info.generation) == (True, "sample_changed", 1)


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_refused_samples_do_not_widen_what_is_accepted(share: float) -> None:
    tracker = SessionTracker()
    tracker.observe(1.0, (LABELS,), noise(0) + share * noise(9))
    for number in (1, 2, 3):
        sample = noise(0) + share * noise(number)
        info = tracker.observe(1 - 0.05 * number, (LABELS,), sample)
        assert (info.fresh, info.reason, info.generation) == (True, "sample_unclear", 0)


def test_changed_prompt_with_the_same_schedule_opens_a_lane() -> None:
    tracker = SessionTracker()
    run(tracker, euler(20), LABELS)
    other = run(tracker, euler(20), LABELS + 1)
    assert other[0].reason == "new_lane" and other[0].lane == 1
    assert_one_generation(other, 1)
    back = run(tracker, euler(5, seed=2), LABELS.clone())
    assert back[0].lane == 0 and back[0].reason == "timestep_jumped_back"


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
        assert tracker.observe(*_args(calls[2], labels)).reason == "new_lane"
        labels.sub_(1).add_(1)  # versions moved, values as in the lane just opened
        assert tracker.observe(*_args(calls[3], labels)).reason == "continues"


def _args(call: Call, *conditioning: object) -> tuple[float, tuple[object, ...], Tensor]:
    return call[0], conditioning, call[1]


def test_small_conditioning_changed_behind_torch_is_seen() -> None:
    labels = LABELS.clone()
    shared = labels.numpy()
    tracker = SessionTracker()
    run(tracker, euler(20)[:2], labels)
    shared[:] = 7
    assert tracker.observe(*_args(euler(20)[2], labels)).reason == "new_lane"


def test_data_swapped_to_another_storage_is_seen() -> None:
    states = torch.randn(4, 700)
    tracker = SessionTracker()
    run(tracker, euler(20)[:2], states)
    version = states._version
    states.data = torch.randn(4, 700)
    assert states._version == version
    assert tracker.observe(*_args(euler(20)[2], states)).reason == "new_lane"


def test_an_alias_with_its_own_version_counter_is_no_proof() -> None:
    states = torch.randn(4, 700)
    tracker = SessionTracker()
    run(tracker, euler(20)[:2], states.data)
    states.add_(1)
    assert states.data._version == 0
    assert tracker.observe(*_args(euler(20)[2], states.data)).reason == "new_lane"


def test_recycled_addresses_do_not_alias() -> None:
    tracker = SessionTracker()
    calls, generator, lanes = euler(50), torch.Generator().manual_seed(0), []
    for call in calls:
        states = torch.randn(4, 700, generator=generator)  # freed and allocated again every time
        lanes.append(tracker.observe(*_args(call, states)).lane)
        del states
        gc.collect(0)  # the youngest: all of the heap would take a second each
    assert lanes == list(range(50))


def test_equal_values_in_new_objects_are_the_same_lane() -> None:
    states = torch.randn(4, 700)
    tracker = SessionTracker()
    infos = [tracker.observe(*_args(call, states.clone(), None, 7.5)) for call in euler(10)]
    assert_one_generation(infos)
    base = torch.cat([states, states])
    assert tracker.observe(*_args(euler(10, seed=1)[0], base[:4], None, 7.5)).lane == 0


@pytest.mark.parametrize("states", [torch.arange(4), torch.randn(4, 700)])
def test_inference_tensors_are_compared_by_value(states: Tensor) -> None:
    with torch.inference_mode():
        tracker, given = SessionTracker(), states.clone()
        assert given.is_inference()
        infos = run(tracker, euler(20)[:3], given)
        assert_one_generation(infos)
        given.add_(1)  # leaves no trace but the values
        assert tracker.observe(*_args(euler(20)[3], given)).reason == "new_lane"
    assert tracker.observe(*_args(euler(20)[4], given)).reason == "continues"


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
    assert tracker.observe(*_args(euler(20)[2], before)).reason == "continues"
    assert tracker.observe(*_args(euler(20)[3], after)).reason == "new_lane"
    assert tracker.observe(*_args(euler(20)[3], before, before)).reason == "new_lane"


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


@pytest.mark.parametrize(
    ("timestep", "reason"),
    [
        (None, "timestep_unknown"),
        (True, "timestep_unknown"),
        ("0.5", "timestep_unknown"),
        (torch.empty(0), "timestep_unknown"),
        (torch.tensor([0.9, 0.8]), "mixed_timesteps"),
        (float("nan"), "timestep_not_finite"),
        (torch.tensor([0.9, float("nan")]), "timestep_not_finite"),
        (float("-inf"), "timestep_not_finite"),
    ],
)
def test_unclear_timesteps_refresh_this_call_and_the_next(timestep: object, reason: str) -> None:
    tracker = SessionTracker()
    calls = euler(20)
    run(tracker, calls[:3])
    info = tracker.observe(timestep, (LABELS,), calls[3][1])
    assert (info.fresh, info.reason, info.timestep) == (True, reason, None)
    assert tracker.observe(*_args(calls[4], LABELS)).reason == "timestep_unknown"
    assert not tracker.observe(*_args(calls[5], LABELS)).fresh
    assert tracker.generations == 1


@pytest.mark.parametrize(
    "spell",
    [
        lambda t: t,
        lambda t: int(t),
        lambda t: torch.tensor(t),
        lambda t: torch.tensor([t]),
        lambda t: torch.full((BATCH,), t),
        lambda t: torch.full((BATCH, 1), int(t), dtype=torch.int64),
        lambda t: torch.full((BATCH,), t, dtype=torch.float16),
    ],
)
def test_every_spelling_of_a_timestep(spell: Callable[[float], object]) -> None:
    tracker = SessionTracker()
    infos = [tracker.observe(spell(float(t)), (LABELS,), x) for t, x in ddim(20)]
    assert_one_generation(infos)
    assert infos[0].timestep == 999


def test_timesteps_that_differ_by_rounding_are_the_same_step() -> None:
    tracker = SessionTracker()
    x = euler(20)[4][1]
    run(tracker, euler(20)[:4])
    assert tracker.observe(0.8, (LABELS,), x).reason == "continues"
    assert tracker.observe(0.8 + 1e-9, (LABELS,), x).reason == "same_step"


def test_a_gap_in_the_schedule_refreshes_without_a_new_generation() -> None:
    tracker = SessionTracker()
    calls = euler(200)
    run(tracker, calls[:5])
    assert not tracker.observe(*_args(calls[6], LABELS)).fresh  # 2 x: within a schedule's freedom
    tracker = SessionTracker()
    run(tracker, calls[:5])
    info = tracker.observe(*_args(calls[8], LABELS))
    assert (info.fresh, info.reason, info.generation) == (True, "schedule_gap", 0)


def test_nan_sample_is_never_continued() -> None:
    tracker = SessionTracker()
    calls = euler(20)
    run(tracker, calls[:3])
    broken = calls[3][1] * float("nan")
    assert tracker.observe(calls[3][0], (LABELS,), broken).reason == "sample_unclear"
    assert tracker.observe(*_args(calls[4], LABELS)).reason == "sample_unclear"
    assert tracker.observe(*_args(calls[5], LABELS)).reason == "continues"


def test_empty_batch_is_always_fresh() -> None:
    tracker = SessionTracker()
    infos = [tracker.observe(t, (None,), torch.empty(0, 4)) for t in (1.0, 0.9, 0.8)]
    assert [i.reason for i in infos] == ["new_lane", "sample_empty", "sample_empty"]


def test_sample_rewritten_in_place_is_compared_with_what_it_was() -> None:
    tracker = SessionTracker()
    latent = noise(0)
    tracker.observe(1.0, (LABELS,), latent)
    latent.copy_(noise(1))
    assert tracker.observe(0.95, (LABELS,), latent).reason == "sample_changed"


WITHOUT_SAMPLE = (1.0, 0.9, 0.8, 0.8, 0.7, 0.3, 0.2, 1.0)


def test_without_a_sample_unclear_moves_refresh() -> None:
    tracker = SessionTracker()
    reasons = [tracker.observe(t, (LABELS,)).reason for t in WITHOUT_SAMPLE]
    assert reasons == [
        "new_lane",
        "direction_unknown_without_sample",
        "continues",
        "timestep_repeated_without_sample",
        "continues",
        "schedule_gap",
        "direction_unknown_without_sample",
        "timestep_jumped_back",
    ]
    assert tracker.generations == 3


def test_inversion_then_sampling() -> None:
    tracker = SessionTracker()
    falling = euler(20)
    assert_one_generation(run(tracker, falling[::-1]))
    infos = run(tracker, falling)
    assert infos[0].reason == "same_step"  # the very call the inversion ended with
    assert infos[1].reason == "timestep_jumped_back"
    assert not any(i.fresh for i in infos[2:])


def test_lanes_are_bounded_and_the_oldest_is_evicted() -> None:
    evicted: list[int] = []
    tracker = SessionTracker(max_lanes=3, on_evict=evicted.append)
    calls = euler(20)
    for label in (0, 1, 2, 0, 3, 1):  # 1 is the oldest when 3 comes; it comes back as lane 4
        tracker.observe(*_args(calls[0], label))
    assert evicted == [1, 2] and tracker.live_lanes == (4, 3, 0) and tracker.lanes == 5
    tracker.reset()
    assert evicted == [1, 2, 0, 3, 4] and tracker.live_lanes == ()
    assert (tracker.generations, tracker.lanes) == (0, 0)
    info = tracker.observe(*_args(calls[1], 0))
    assert (info.lane, info.generation, info.reason) == (5, 0, "new_lane")
    assert (tracker.generations, tracker.lanes) == (1, 1)


def test_invalidate_refreshes_each_lane_once() -> None:
    tracker = SessionTracker()
    calls = euler(20)
    for call in calls[:3]:
        for label in (0, 1):
            tracker.observe(*_args(call, label))
    tracker.invalidate("weights_changed")
    for label in (0, 1):
        info = tracker.observe(*_args(calls[3], label))
        assert (info.fresh, info.reason, info.generation) == (True, "weights_changed", 0)
    tracker.invalidate("step_failed", lane=1)
    assert not tracker.observe(*_args(calls[4], 0)).fresh
    assert tracker.observe(*_args(calls[4], 1)).reason == "step_failed"
    assert not tracker.observe(*_args(calls[5], 1)).fresh


def test_explicit_generation_starts_anew_and_ignores_jumps() -> None:
    tracker = SessionTracker()
    calls = euler(20)
    run(tracker, calls[:5])
    with tracker.generation():
        first = tracker.observe(*_args(calls[5], LABELS))
        assert (first.reason, first.generation) == ("generation_started", 1)
        assert tracker.observe(*_args(calls[5], NULL)).generation == 1
        for number in (6, 7, 6, 5, 6, 6, 12):
            info = tracker.observe(*_args(calls[number], LABELS))
            assert not info.fresh and info.generation == 1
        assert info.step == 6  # one of the seven calls repeated its timestep
        assert not tracker.observe(None, (LABELS,), calls[12][1]).fresh
    after = tracker.observe(*_args(calls[13], LABELS))
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
        a.append(tracker.observe(*_args(first, 0)))
        b.append(tracker.observe(*_args(second, 1)))
    assert_one_generation(a, 0)
    assert_one_generation(b, 1)


def test_two_generations_sharing_a_conditioning_never_share_rows() -> None:
    tracker = SessionTracker()
    for first, second in zip(euler(20, seed=0), euler(20, seed=1)):
        assert tracker.observe(*_args(first, NULL)).fresh
        assert tracker.observe(*_args(second, NULL)).fresh


def test_infinite_loop_of_one_step_generations() -> None:
    tracker = SessionTracker()
    infos = [tracker.observe(1.0, (LABELS,), noise(seed)) for seed in range(5)]
    assert [i.generation for i in infos] == [0, 1, 2, 3, 4]
    assert all(i.fresh and i.step == 0 for i in infos)


def test_timestep_is_kept_exactly() -> None:
    tracker = SessionTracker()
    big = 2**40 + 1
    assert tracker.observe(torch.tensor(big), (), noise(0)).timestep == big
    assert tracker.observe(math.pi, (), noise(1)).timestep == math.pi
