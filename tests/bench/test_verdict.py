"""Verdicts on made-up figures: who wins, and that the rule never helps the default policy."""

from __future__ import annotations

import math

import pytest

from moeca_compile.bench.store import Row
from moeca_compile.bench.summary import Summary, summarise
from moeca_compile.bench.table import table
from moeca_compile.bench.verdict import Point, at_speed, frontier, judge


def row(policy: str, speedup: float, mse: float, seed: int = 0, **more: object) -> Row:
    head = {"subject": "m", "sampler": "s", "key": f"{policy}{speedup}{seed}", "peak": 2.0}
    head |= {"candidate": f"{policy} {speedup}", "policy": policy, "engine": "graph"}
    figures = {"speedup": speedup, "mse": mse, "seed": seed, "accuracy": 0.5}
    figures |= {"psnr_mean_db": 1.0, "ssim": 0.9, "relative_error": 0.1, "seconds": 1.0}
    return head | figures | {"warm": True} | more


def at_db(policy: str, speedup: float, psnr_db: float) -> Row:
    return row(policy, speedup, 4.0 / 10 ** (psnr_db / 10))


def verdicts(*rows: Row, targets: tuple[float, ...] = (3.0,)) -> list:
    return judge(summarise(rows), "ours", targets)


def test_the_better_picture_wins_and_the_difference_is_told() -> None:
    (won,) = verdicts(at_db("ours", 3.0, 44.0), at_db("fora", 3.0, 40.0))
    assert (won.winner, won.ours.name) == ("ours", "ours 3.0")
    assert won.difference_db == pytest.approx(4.0)
    (lost,) = verdicts(at_db("ours", 3.0, 40.0), at_db("fora", 3.0, 44.0))
    assert (lost.winner, lost.rival.name) == ("fora", "fora 3.0")
    (equal,) = verdicts(at_db("ours", 3.0, 40.0), at_db("fora", 3.0, 40.15))
    assert equal.winner == "equal"


def test_a_rival_may_be_a_tenth_slower_and_a_faster_one_counts() -> None:
    slower = verdicts(at_db("ours", 3.0, 40.0), at_db("fora", 2.75, 42.0))[0]
    assert slower.winner == "fora"
    too_slow = verdicts(at_db("ours", 3.0, 40.0), at_db("fora", 2.6, 42.0))[0]
    assert too_slow.winner == "ours" and too_slow.rival is None
    faster = verdicts(at_db("ours", 3.0, 40.0), at_db("fora", 6.0, 42.0))[0]
    assert faster.winner == "fora"


def test_ours_must_reach_the_speed() -> None:
    (verdict,) = verdicts(at_db("ours", 2.8, 50.0), at_db("fora", 3.0, 30.0))
    assert (verdict.ours, verdict.winner) == (None, "fora")
    (nobody,) = verdicts(at_db("ours", 2.0, 50.0), at_db("fora", 2.0, 30.0))
    assert nobody.winner == "nobody"


def test_a_rival_that_skips_over_our_speed_is_interpolated() -> None:
    rows = [at_db("ours", 3.0, 40.0), at_db("fora", 2.0, 44.0), at_db("fora", 4.0, 38.0)]
    (verdict,) = verdicts(*rows)
    assert verdict.rival.psnr_db == pytest.approx(41.0)
    assert not verdict.rival.measured
    assert verdict.winner == "fora"
    assert "fora, interpolated: 41.00 at 3.00x" in table(summarise(rows), [verdict], "ours")


def test_dominated_points_do_not_spoil_an_interpolation() -> None:
    points = [Point(str(s), "p", s, d) for s, d in [(2, 44), (2.9, 20), (4, 38), (1.5, 41)]]
    assert [p.speedup for p in frontier(points)] == [2, 4]
    assert at_speed(points, 3.0).psnr_db == pytest.approx(41.0)
    assert at_speed(points, 1.9) is None and at_speed(points, 4.1) is None


def test_full_runs_failures_and_perfect_copies_are_no_rivals() -> None:
    failed = {**at_db("fora", 3.0, 60.0), "error": "RuntimeError: no"}
    rows = [at_db("ours", 3.0, 40.0), failed, at_db("full", 3.5, 60.0), row("copy", 3.0, 0.0)]
    (verdict,) = verdicts(*rows)
    assert verdict.rival is None


def test_seeds_are_pooled_by_error_not_by_decibel() -> None:
    reference = row("reference", 1.0, 0.0, accuracy=0.75)
    rows = [reference, row("ours", 3.0, 1e-4, 0), {**row("ours", 3.0, 4e-4, 1)}]
    (summary,) = summarise(rows)
    assert summary.psnr_db == pytest.approx(10 * math.log10(4 / 2.5e-4))
    assert summary.psnr_spread_db == pytest.approx(10 * math.log10(4))
    assert (summary.accuracy_full, summary.seeds) == (0.75, (0, 1))
    assert summary.seconds is None  # no kernels, no time


def test_wall_time_is_the_best_warm_generation_over_the_uncached_one() -> None:
    timed = {"engine": "inductor"}
    rows = [
        row("full", 1.0, 1e-9, 0, seconds=99.0, warm=False, **timed),
        row("full", 1.0, 1e-9, 1, seconds=10.0, **timed),
        row("ours", 3.0, 1e-4, 0, seconds=1.0, warm=False, **timed),
        row("ours", 3.0, 1e-4, 1, seconds=4.0, **timed),
    ]
    found: dict[str, Summary] = {s.policy: s for s in summarise(rows)}
    assert found["ours"].wall_speedup == pytest.approx(2.5)
    assert found["full"].wall_speedup == pytest.approx(1.0)


def test_table_names_failures_and_losers() -> None:
    failed = {**at_db("duca", 3.0, 60.0), "error": "RuntimeError: no rows"}
    for name in ("speedup", "mse", "psnr_mean_db"):
        del failed[name]
    summaries = summarise([at_db("ours", 3.0, 40.0), at_db("fora", 3.0, 44.0), failed])
    text = table(summaries, judge(summaries, "ours", (3.0,)), "ours")
    assert "failed: duca 3.0: RuntimeError: no rows" in text
    assert "-4.00" in text and "ours 3.0: 40.00 at 3.00x" in text


def test_one_bad_picture_loses_by_pixels_and_wins_by_pictures() -> None:
    ours = at_db("ours", 3.0, 40.0) | {"psnr_mean_db": 50.0}
    rival = at_db("fora", 3.0, 42.0) | {"psnr_mean_db": 45.0}
    rows = summarise([ours, rival])
    (pixels,), (pictures,) = (
        judge(rows, "ours", (3.0,), metric) for metric in ("psnr_db", "psnr_mean_db")
    )
    assert (pixels.winner, pictures.winner) == ("fora", "ours")
    shown = table(rows, [pixels, pictures], "ours")
    assert "PSNR over all pixels" in shown and "PSNR mean over images" in shown
