"""The tracker on real sampling loops: one generation each, and every way to end up in another."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from moeca_compile.runtime.session import SessionTracker, StepInfo
from runtime.schedules import BATCH, ancestral, ddim, euler, flow, heun, karras, noise
from runtime.tracking import LABELS, NULL, arguments, assert_one_generation, run

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
    assert tracker.observe(*arguments(calls[4], LABELS)).reason == "timestep_unknown"
    assert not tracker.observe(*arguments(calls[5], LABELS)).fresh
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
    assert not tracker.observe(
        *arguments(calls[6], LABELS)
    ).fresh  # 2 x: within a schedule's freedom
    tracker = SessionTracker()
    run(tracker, calls[:5])
    info = tracker.observe(*arguments(calls[8], LABELS))
    assert (info.fresh, info.reason, info.generation) == (True, "schedule_gap", 0)


def test_nan_sample_is_never_continued() -> None:
    tracker = SessionTracker()
    calls = euler(20)
    run(tracker, calls[:3])
    broken = calls[3][1] * float("nan")
    assert tracker.observe(calls[3][0], (LABELS,), broken).reason == "sample_unclear"
    assert tracker.observe(*arguments(calls[4], LABELS)).reason == "sample_unclear"
    assert tracker.observe(*arguments(calls[5], LABELS)).reason == "continues"


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


def test_timestep_is_kept_exactly() -> None:
    tracker = SessionTracker()
    big = 2**40 + 1
    assert tracker.observe(torch.tensor(big), (), noise(0)).timestep == big
    assert tracker.observe(math.pi, (), noise(1)).timestep == math.pi
