"""Counts are sums of what ran, in exact numbers; nothing planned, nothing lost between reads."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from moeca_compile.policies.protocol import Decision
from moeca_compile.runtime.stats import Costs, LayerCost, Stats, merge_stats
from moeca_compile.runtime.telemetry import FIELDS, MAX_EVENTS, Counters

COSTS = (
    LayerCost("blocks.0", branch_flops=10, token_flops=7, shared_flops=3, tokens=8, branches=16),
    LayerCost("blocks.1", branch_flops=10, token_flops=7, shared_flops=0, tokens=8, branches=16),
)
FIXED = 100.0
FULL = FIXED + (16 * 10 + 8 * 7 + 8 * 3) + (16 * 10 + 8 * 7)
PLAIN, REUSE = Decision("plain", "caching_off"), Decision("reuse", "policy")
# attention ran on 3 and 6 rows, the shared expert on 4 and 0: padding included
COUNTS = torch.tensor([[3, 2, 1, 0, 2, 3, 4, 0], [5, 4, 2, 1, 0, 6, 0, 0]])


def counters_of(layers: tuple[LayerCost, ...], fixed: float = 0.0) -> Counters:
    return Counters([layer.open_ended for layer in layers], lambda: Costs(layers, fixed))


def filled() -> Counters:
    counters = counters_of(COSTS, FIXED)
    counters.ran(Decision("refresh", "new_lane"))
    counters.ran(REUSE, COUNTS)
    counters.ran(REUSE, COUNTS * 2)
    counters.ran(Decision("refresh", "interval"))
    counters.ran(PLAIN)
    return counters


def test_totals() -> None:
    stats = filled().stats(cache_bytes=77, generations=2, lanes=1)
    assert (stats.steps, stats.refresh_steps, stats.reuse_steps, stats.plain_steps) == (5, 2, 2, 1)
    assert stats.branches_total == 5 * 32
    assert stats.branches_computed == 3 * 32 + 3 * (3 + 5)
    assert stats.tokens_total == 5 * 16
    assert stats.tokens_attended == 3 * 16 + 3 * (2 + 4)
    assert (stats.unmatched, stats.dropped) == (3 * 3, 3 * 1)
    assert (stats.cache_bytes, stats.generations, stats.lanes) == (77, 2, 1)
    assert stats.reasons == {"new_lane": 1, "interval": 1}


def test_flops() -> None:
    stats = filled().stats()
    assert stats.flops_full == 5 * FULL
    # Rows that ran as padding (3 for 2, 6 for 4) cost as much as the ones asked for.
    reused = 3 * (3 * 10 + 3 * 7 + 4 * 3) + 3 * (5 * 10 + 6 * 7)
    assert stats.flops_computed == 3 * FULL + 2 * FIXED + reused
    assert stats.speedup_flops == stats.flops_full / stats.flops_computed > 1


def test_per_layer_rows() -> None:
    first, second = filled().stats().layers
    assert (first.name, first.branches_computed, first.shared_rows) == ("blocks.0", 57, 30)
    assert (second.tokens_attended, second.shared_rows, second.dropped) == (36, 0, 3)


def test_a_number_of_branches_that_only_the_data_has_is_counted_in_every_step() -> None:
    first = dataclasses.replace(COSTS[0], open_ended=True)
    counters = counters_of((first, COSTS[1]), FIXED)
    branches, computed = FIELDS.index("branches"), FIELDS.index("branches_computed")
    full, reused = torch.zeros(2, 8).long(), COUNTS.clone()
    full[0, branches] = full[0, computed] = 9
    reused[0, branches] = 7
    counters.ran(Decision("refresh", "new_lane"), full)
    counters.ran(REUSE, reused)
    counters.ran(PLAIN, full)
    layer, other = counters.stats().layers
    assert (layer.branches_total, layer.branches_computed) == (9 + 7 + 9, 9 + 3 + 9)
    assert layer.flops_full == 25 * 10 + 3 * 8 * (7 + 3)
    assert layer.flops_computed == 21 * 10 + 2 * 8 * (7 + 3) + 3 * 7 + 4 * 3
    assert (other.branches_total, other.branches_computed) == (3 * 16, 2 * 16 + 5)
    with pytest.raises(ValueError, match="counts"):
        counters.ran(PLAIN)


def test_reading_does_not_change_anything_and_counting_goes_on() -> None:
    counters = filled()
    assert counters.stats() == counters.stats()
    counters.ran(REUSE, COUNTS)
    assert counters.stats().branches_computed == 3 * 32 + 4 * (3 + 5)


def test_counts_may_be_overwritten_after_the_step() -> None:
    counters, output = counters_of(COSTS), COUNTS.clone()
    counters.ran(REUSE, output)
    output.fill_(1000)
    assert counters.stats().branches_computed == 8


def test_counts_may_come_from_inference_mode_and_outside() -> None:
    counters = counters_of(COSTS)
    with torch.inference_mode():
        counters.ran(REUSE, COUNTS.clone())
    counters.ran(REUSE, COUNTS)
    assert counters.stats().branches_computed == 16


def test_a_frozen_snapshot_does_not_follow_the_counters() -> None:
    counters = filled()
    before = counters.stats()
    counters.ran(Decision("refresh", "interval"))
    assert before.reasons["interval"] == 1 and before.refresh_steps == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.reuse_steps = 9  # pyright: ignore[reportAttributeAccessIssue]


def test_reset_starts_at_zero() -> None:
    counters = filled()
    counters.event("x")
    counters.reset()
    assert counters.stats() == counters_of(COSTS, FIXED).stats()
    assert counters.stats().speedup_flops == 1.0


@pytest.mark.parametrize(
    "counts",
    [COUNTS[:1], COUNTS[:, :5], COUNTS.int(), COUNTS.float(), torch.zeros(0, len(FIELDS)).long()],
)
def test_counts_of_another_form_are_refused(counts: torch.Tensor) -> None:
    counters = counters_of(COSTS)
    with pytest.raises(ValueError, match=r"expected int64 \(2, 8\)"):
        counters.ran(REUSE, counts)
    assert counters.stats().steps == 0


def test_counts_belong_to_reuse_steps_only() -> None:
    with pytest.raises(ValueError, match="reuse"):
        counters_of(COSTS).ran(REUSE)
    with pytest.raises(ValueError, match="refresh"):
        counters_of(COSTS).ran(Decision("refresh", "interval"), COUNTS)


def test_to_dict_is_json_and_has_every_public_number() -> None:
    counters = filled()
    counters.event("lane 3 evicted")
    flat = json.loads(json.dumps(counters.stats(cache_bytes=5).to_dict()))
    names = [name for name, value in vars(Stats).items() if isinstance(value, property)]
    assert {"steps", "branches_computed", "tokens_attended", "speedup_flops"} <= set(names)
    for name in [*names, "refresh_steps", "reuse_steps", "plain_steps", "generations", "lanes"]:
        assert isinstance(flat[name], (int, float)), name
    assert flat["cache_bytes"] == 5
    assert flat["reasons"] == {"new_lane": 1, "interval": 1}
    assert flat["events"] == ["lane 3 evicted"]
    assert [layer["name"] for layer in flat["layers"]] == ["blocks.0", "blocks.1"]


def test_the_table_has_a_line_per_layer_and_the_reasons() -> None:
    text = str(filled().stats())
    for part in ("blocks.0", "blocks.1", "57/80", "new_lane 1", "refresh 2, reuse 2, plain 1"):
        assert part in text
    assert "steps 0" in str(Stats())


def test_costs_are_counted_when_the_totals_are_first_read() -> None:
    asked: list[int] = []

    def costs() -> Costs:
        asked.append(1)
        return Costs(COSTS, FIXED)

    counters = Counters([False, False], costs)
    counters.ran(REUSE, COUNTS)
    counters.reset()
    assert not asked
    assert counters.stats() == counters.stats() and len(asked) == 1


def test_events_are_bounded() -> None:
    counters = counters_of(COSTS)
    for number in range(MAX_EVENTS + 10):
        counters.event(str(number))
    events = counters.stats().events
    assert len(events) == MAX_EVENTS and events[-1] == str(MAX_EVENTS + 9)


def test_merge_adds_entries_by_layer() -> None:
    small = tuple(dataclasses.replace(cost, tokens=4, branches=8) for cost in COSTS)
    other = counters_of(small, 50.0)
    other.ran(Decision("refresh", "new_lane"))
    left, right = filled().stats(cache_bytes=1, generations=2), other.stats(cache_bytes=2, lanes=1)
    both = merge_stats([left, right])
    assert both.branches_total == 5 * 32 + 16 and len(both.layers) == 2
    assert both.flops_full == left.flops_full + right.flops_full
    assert both.flops_computed == left.flops_computed + right.flops_computed
    assert (both.cache_bytes, both.generations, both.lanes, both.steps) == (3, 2, 1, 6)
    assert both.reasons == {"new_lane": 2, "interval": 1}
    assert merge_stats([]) == Stats()
