"""Which generation, lane and step a call of the denoiser is, and whether old rows may be read.

    t, conditioning, sample     StepInfo
    1.0   labels  x0            generation 0  lane 0  step 0  fresh new_lane
    1.0   null    x0            generation 0  lane 1  step 0  fresh new_lane
    0.98  labels  x1            generation 0  lane 0  step 1  continues
    1.0   labels  y0            generation 1  lane 0  step 0  fresh timestep_jumped_back

Rules, first hit wins; a call is `fresh` (no old row may be read) when its identity is unclear:
a lane not seen before (+); explicit control (+); a move against the lane's direction (+); a sample
that does not continue the lane's last one (+, probe.py); a timestep that is missing, mixed in the
batch or not finite; a gap GAP_RATIO times wider than any before; rows invalidated from outside.
(+) starts a new generation, the others only refresh. The same timestep with a continuing sample is
a further evaluation of the same step (Heun): `step` stays.

Without a sample two generations with falling timesteps after each other cannot be told apart
where the second starts below the first one's end: pass the sample. Not thread-safe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from moeca_compile.errors import SessionError
from moeca_compile.runtime.lanes import MAX_LANES, Conditioning, Lane, LaneBook
from moeca_compile.runtime.probe import chords, judge_chords, take_probe
from moeca_compile.runtime.timestep import UNKNOWN, judge_timestep, read_numbers

GAP_RATIO = 3.0  # schedules widen by 1.7 a step at most (20 steps, shift 12); 3: calls are missing
SAME_TIMESTEP = 1e-6  # relative: rounding of a recomputed timestep is no move
SAME_SAMPLE = 1e-3  # chord below which two lanes were called on one sample

NEW_LANE = "new_lane"
STARTED = "generation_started"
ENDED = "generation_ended"
SAMPLE_CHANGED = "sample_changed"
SAMPLE_UNCLEAR = "sample_unclear"
SAMPLE_EMPTY = "sample_empty"
JUMPED_BACK = "timestep_jumped_back"
REPEATED = "timestep_repeated_without_sample"
NO_DIRECTION = "direction_unknown_without_sample"
GAP = "schedule_gap"
SAME_STEP = "same_step"
CONTINUES = "continues"


@dataclass(frozen=True)
class StepInfo:
    """What one call is. generation, lane, step count from 0; `step` within the lane's generation.

    fresh: no cached row of the lane may be read. reason: why, a short stable word; without `fresh`
    "continues" or "same_step". new_generation: this call starts one (statistics begin anew).
    """

    generation: int
    lane: int
    step: int
    fresh: bool
    reason: str
    new_generation: bool
    timestep: float | None


@dataclass(frozen=True)
class _Verdict:
    reason: str
    fresh: bool = True
    starts: bool = False


_CONTINUES = _Verdict(CONTINUES, fresh=False)
_SAME_STEP = _Verdict(SAME_STEP, fresh=False)


class SessionTracker:
    """Tells calls apart. Holds copies of conditioning inputs and probes, no cached row.

    on_evict: called with a lane's key when its rows are no longer reachable.
    """

    def __init__(
        self, max_lanes: int = MAX_LANES, on_evict: Callable[[int], None] | None = None
    ) -> None:
        self._book = LaneBook(max_lanes, on_evict)
        self._generations = 0
        self._lanes_before = 0
        self._explicit = False
        self._explicit_generation: int | None = None

    @property
    def generations(self) -> int:
        """Generations begun since the last reset."""
        return self._generations

    @property
    def lanes(self) -> int:
        """Lanes opened since the last reset, evicted ones included."""
        return self._book.opened - self._lanes_before

    @property
    def live_lanes(self) -> tuple[int, ...]:
        """Keys of the lanes now known, most recently used first."""
        return tuple(lane.key for lane in self._book.lanes)

    def observe(
        self, timestep: object, conditioning: Conditioning, sample: Tensor | None = None
    ) -> StepInfo:
        """Place one call; to be called once per call, before anything is computed.

        timestep: number, tensor of any shape, or None. conditioning: every other input that can
        change the result. sample: the latent [B, ...] being denoised.
        """
        probe = None if sample is None else take_probe(sample)
        lane, opened = self._book.find(conditioning, sample)
        moved = None if probe is None or lane.probe is None else chords(lane.probe, probe)
        times, distances = read_numbers(timestep, moved)
        now, problem = judge_timestep(times)
        # max() may skip a NaN, sum() cannot.
        chord = max(distances) if distances and sum(distances) >= 0 else float("nan")
        if opened:
            verdict = _Verdict(NEW_LANE, starts=True)
        elif lane.stale_generation:
            verdict = _Verdict(lane.stale, starts=True)
        else:
            verdict = self._judge_timestep(lane, now, problem, probe is not None)
            if sample is not None and not verdict.starts:
                repeats = verdict.reason == SAME_STEP
                verdict = self._judge_sample(lane, probe, chord, repeats) or verdict
            if lane.stale and not verdict.fresh:
                verdict = _Verdict(lane.stale)
        lane.problem = problem
        return self._enter(lane, verdict, now, probe, chord)

    def invalidate(self, reason: str, lane: int | None = None) -> None:
        """Let the next call of `lane`, or of every lane, be fresh with `reason` (weights changed,
        a step that failed). The generation goes on."""
        for known in self._book.lanes:
            if lane is None or known.key == lane:
                known.stale = known.stale or reason

    def reset(self) -> None:
        """Forget every lane and count from zero; lane keys are still never used twice."""
        self._book.clear()
        self._generations = 0
        self._lanes_before = self._book.opened
        self._explicit_generation = None

    def begin_generation(self) -> None:
        """Start a new generation on all lanes; until `end_generation` calls belong to it.

        Inside, a timestep that repeats, jumps back, widens its gap or is missing starts nothing
        (restart samplers), and a sample that moves far is accepted (stochastic samplers). An
        unrelated sample, mixed or not-finite timesteps still refresh. Raises SessionError inside.
        """
        if self._explicit:
            raise SessionError("begin_generation: expected no open generation, found one; end it")
        self._explicit = True
        self._start_all(STARTED)

    def end_generation(self) -> None:
        """Close it: the next call of every lane starts another. SessionError when none is open."""
        if not self._explicit:
            raise SessionError("end_generation: expected an open generation, found none")
        self._explicit = False
        self._start_all(ENDED)

    @contextmanager
    def generation(self) -> Iterator[None]:
        """`begin_generation` and, error or not, `end_generation`."""
        self.begin_generation()
        try:
            yield
        finally:
            self.end_generation()

    def _start_all(self, reason: str) -> None:
        self._explicit_generation = None
        for lane in self._book.lanes:
            lane.stale, lane.stale_generation = reason, True

    def _judge_sample(
        self, lane: Lane, probe: Tensor | None, chord: float, repeats: bool
    ) -> _Verdict | None:
        if probe is None:
            return _Verdict(SAMPLE_EMPTY)
        continuity = judge_chords(chord, lane.chords, vouched=self._explicit)
        # No sampler moves far without moving in time: that is another sample's first step.
        far = repeats and continuity == "unclear" and not math.isnan(chord)
        if continuity == "broken" or far:
            return _Verdict(SAMPLE_CHANGED, starts=not self._explicit)
        return _Verdict(SAMPLE_UNCLEAR) if continuity == "unclear" else None

    def _judge_timestep(
        self, lane: Lane, now: float | None, problem: str, has_probe: bool
    ) -> _Verdict:
        last = lane.timestep
        if now is None or last is None:
            asserted = self._explicit and {problem, lane.problem} <= {"", UNKNOWN}
            return _CONTINUES if asserted else _Verdict(problem or UNKNOWN)
        if _is_same(now, last):
            return _SAME_STEP if has_probe or self._explicit else _Verdict(REPEATED)
        if self._explicit:
            return _CONTINUES
        move = now - last
        if move * lane.direction < 0:
            return _Verdict(JUMPED_BACK, starts=True)
        if lane.direction == 0 and not has_probe:
            return _Verdict(NO_DIRECTION)
        if 0 < lane.widest_gap * GAP_RATIO < abs(move):
            return _Verdict(GAP, starts=not has_probe)
        return _CONTINUES

    def _enter(
        self, lane: Lane, verdict: _Verdict, now: float | None, probe: Tensor | None, chord: float
    ) -> StepInfo:
        """Write the call into the lane."""
        if verdict.starts:
            lane.generation = self._generation_of(lane, now, probe)
            lane.step, lane.direction, lane.widest_gap, lane.gap = 0, 0, 0.0, 0.0
            lane.chords.clear()
        else:
            lane.step += verdict.reason != SAME_STEP
            _learn_schedule(lane, now)
            if not verdict.fresh and not math.isnan(chord):
                lane.add_chord(chord)  # a refused sample must not widen what is accepted
        lane.timestep, lane.probe = now, probe
        lane.stale, lane.stale_generation = "", False
        return StepInfo(
            lane.generation, lane.key, lane.step, verdict.fresh, verdict.reason, verdict.starts, now
        )

    def _generation_of(self, lane: Lane, now: float | None, probe: Tensor | None) -> int:
        """The number of the generation `lane` starts: that of a sibling called on the same sample
        at the same timestep (CFG in two calls), else the next. For counting only."""
        if self._explicit and self._explicit_generation is not None:
            return self._explicit_generation
        if not self._explicit:
            for other in self._book.lanes:
                joins = other.generation != lane.generation and other.timestep == now
                if joins and _same_sample(other.probe, probe):
                    return other.generation
        number = self._generations
        self._generations += 1
        if self._explicit:
            self._explicit_generation = number
        return number


def _same_sample(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    if left.shape != right.shape or left.device != right.device:
        return False
    return bool((chords(left, right) <= SAME_SAMPLE).all())


def _is_same(now: float, last: float) -> bool:
    return abs(now - last) <= SAME_TIMESTEP * max(abs(now), abs(last))


def _learn_schedule(lane: Lane, now: float | None) -> None:
    last = lane.timestep
    if now is None or last is None or _is_same(now, last):
        return
    if lane.direction == 0:
        lane.direction = 1 if now > last else -1
    lane.gap = abs(now - last)
    lane.widest_gap = max(lane.widest_gap, lane.gap)
