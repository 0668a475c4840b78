"""From raw times to rows: medians, ratios, the line through reuse steps, and what is shown."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from moeca_compile.errors import OptionsError
from moeca_compile.speed.candidates import BASELINES, BUDGETED, MOECA, PEER, Candidate, choose
from moeca_compile.speed.figures import Figures, figures
from moeca_compile.speed.measure import Measured
from moeca_compile.speed.rows import fit, summarise
from moeca_compile.speed.table import rows_table, table
from moeca_compile.speed.worker import Finished, Generation

DONE = Finished(400.0, 400.0, 0, 2**20, 2**21, threads=1)
OURS = Candidate("ours", MOECA, BUDGETED)


def measured(candidate: Candidate, full: float, cached: float | None, flops: float) -> Measured:
    """Two generations of four steps, the second a tenth slower; processor time is half."""
    kinds = ["full"] * 4 if cached is None else ["refresh", "reuse", "reuse", "reuse"]
    times = [full if kind in ("full", "refresh") else cached for kind in kinds]
    made = [
        Generation(kinds, [k * t for t in times], [k * t / 2 for t in times], 0.1)
        for k in (1.0, 1.1)
    ]
    done = replace(DONE, flops=flops, cache_bytes=0 if cached is None else 3 * 2**20)
    return Measured(candidate, 9.0, 2.0, made, done)


def rows() -> list[Figures]:
    eager, shipped, one_graph = BASELINES
    return figures(
        [
            measured(eager, 120, None, 400.0),
            measured(shipped, 100, None, 0.0),
            measured(one_graph, 80, None, 400.0),
            measured(OURS, 84, 20, 160.0),
            measured(Candidate("slow", MOECA), 100, 100, 400.0),
            measured(Candidate("theirs", PEER), 100, None, 0.0),
            Measured(Candidate("broken", PEER), error="ImportError: no such module"),
        ]
    )


def test_speed_ups_are_over_the_two_baselines_and_over_flops() -> None:
    ours = rows()[3]
    assert ours.ms_step == pytest.approx(1.05 * 36)
    assert (ours.refresh_ms, ours.cached_ms) == pytest.approx((1.05 * 84, 21))
    assert ours.over_one_graph == pytest.approx(80 / 36)
    assert ours.over_shipped == pytest.approx(100 / 36)
    assert ours.cpu_over_one_graph == pytest.approx(80 / 36)
    assert ours.over_flops == pytest.approx(400 / 160)
    assert ours.kept == pytest.approx(80 / 36 / 2.5)
    assert ours.computed == pytest.approx(0.1)


def test_compiling_is_what_the_first_generation_took_beyond_a_later_one() -> None:
    eager, shipped = rows()[:2]
    assert eager.compile_cold_s is None and eager.compile_warm_s is None
    assert shipped.compile_cold_s == pytest.approx(9 - 0.42)
    assert shipped.compile_warm_s == pytest.approx(2 - 0.42)


def test_inductor_has_the_arithmetic_of_eager_and_a_peer_has_none_that_is_known() -> None:
    found = {row.name: row for row in rows()}
    assert found["Inductor, as shipped"].over_flops == 1.0
    assert found["theirs"].over_flops is None and found["theirs"].kept is None
    assert found["theirs"].over_shipped == pytest.approx(1.0)


def test_slower_rows_and_failed_ones_are_shown() -> None:
    shown = table(rows(), "machine")
    assert "failed: broken: ImportError: no such module" in shown
    slow = next(line for line in shown.splitlines() if line.startswith("slow"))
    assert " 0.80 " in slow, "slower than the baseline, and said so"
    assert shown.splitlines()[0] == "machine"


def test_a_row_is_json() -> None:
    told = json.loads(json.dumps([row.to_dict() for row in rows()]))
    assert told[3]["kept"] == pytest.approx(80 / 36 / 2.5)
    assert told[-1]["error"] and told[-1]["ms_step"] is None


def test_the_line_is_that_of_least_squares() -> None:
    exact = fit([0.0, 0.1, 0.5], [0.03, 0.13, 0.53])
    assert (exact.intercept, exact.slope) == pytest.approx((0.03, 1.0))
    assert exact.worst == pytest.approx(0.0)
    bent = fit([0.0, 1.0, 2.0], [0.0, 0.0, 3.0])
    assert (bent.intercept, bent.slope, bent.worst) == pytest.approx((-0.5, 1.5, 1.0))


def test_row_costs_are_in_refresh_steps() -> None:
    found = {
        share: [Generation(["refresh", "reuse"], [100, 5 + 110 * share], [50, 50 * share], share)]
        for share in (0.5, 0.1, 0.2)
    }
    costs = summarise(found, DONE)
    assert [p.asked for p in costs.points] == [0.1, 0.2, 0.5]
    assert (costs.wall.intercept, costs.wall.slope) == pytest.approx((0.05, 1.1))
    assert (costs.cpu.intercept, costs.cpu.slope) == pytest.approx((0.0, 1.0))
    shown = rows_table(costs, "machine")
    assert "wall: 5.0 % of a refresh step + 1.10 x share computed" in shown
    json.dumps(costs.to_dict())


def test_candidates_by_name_and_their_mistakes() -> None:
    names = [c.name for c in choose(["budget=0.2,order=attention_first"], ["theirs"])]
    assert names == [*(c.name for c in BASELINES), *names[3:]]
    assert "budget=0.2" in names[3] and names[4] == "theirs"
    assert [c.options for c in choose([], [])[3:]] == [BUDGETED, {}]
    with pytest.raises(OptionsError, match="did you mean 'budget'"):
        choose(["budgets=0.2"], [])
    with pytest.raises(OptionsError, match="--steps"):
        choose(["steps=3"], [])
