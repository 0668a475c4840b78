"""Errors read off inner products equal errors of tensors, for every predictor."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moeca_compile.passes.histories import Histories, History, gram
from moeca_compile.policies.predictors import PREDICTIONS, Gram, Predictor, make_predictor
from moeca_compile.policies.trail import Trail

DEPTH, TIMES, NOW = 3, (0.5, 0.6, 0.8), 0.45


def stored(seed: int = 0) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Outputs and samples newest first, new output, sample now; float32 [2, 3, 4, 4]."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2 * DEPTH + 2)]
    return made[:DEPTH], made[DEPTH : 2 * DEPTH], made[-2], made[-1]


def measured(with_samples: bool, nan_at: int | None = None) -> Gram:
    outputs, samples, new, now = stored()
    graph = torch.fx.Graph()
    node = graph.placeholder("value")
    node.meta["val"] = new
    kept = History("output0", node, DEPTH, "output")
    moved = History("sample", node, DEPTH, "output") if with_samples else None
    caches = dict(zip(kept.fields, outputs))
    if moved is not None:
        caches |= dict(zip(moved.fields, samples))
    if nan_at is not None:
        caches[kept.fields[nan_at]] = torch.full_like(new, math.nan)
    numbers = gram(Histories(outputs=(kept,), sample=moved), caches, new, now)
    return Gram(DEPTH, tuple(numbers.tolist()))


def evaluate(predictor: Predictor) -> Tensor:
    outputs, samples, _, now = stored()
    total = sum(c * o for c, o in zip(predictor.outputs, outputs)) + predictor.now * now
    return total + sum(e * x for e, x in zip(predictor.samples, samples))


def trail() -> Trail:
    found = Trail(DEPTH)
    for time in reversed(TIMES):
        found.add(time)
    return found


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_error_is_that_of_the_tensors(kind: str, order: int) -> None:
    predictor = make_predictor(kind, order, trail(), NOW, DEPTH, gain=0.3)
    assert predictor is not None
    new = stored()[2]
    expected = float((new - evaluate(predictor)).norm() / new.norm())
    assert measured(True).error(predictor) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["clean", "noise"])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_flow_spaces_hold_what_they_say(kind: str, scale: float) -> None:
    """With one constant clean image (or noise) in all stored pairs, the forecast meets it."""
    fixed = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    found = Trail(2)
    samples, outputs = [], []
    for time in (0.8, 0.6):
        found.add(time * scale)
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(int(10 * time)))
        samples.insert(0, x)
        outputs.insert(0, (x - fixed) / time if kind == "clean" else (fixed - x) / (1 - time))
    x, t = torch.randn(2, 3), 0.5
    made = make_predictor(kind, 1, found, t * scale, 2, 0.0)
    assert made is not None
    value = sum(c * o for c, o in zip(made.outputs, outputs)) + made.now * x
    value = value + sum(e * s for e, s in zip(made.samples, samples))
    expected = (x - fixed) / t if kind == "clean" else (fixed - x) / (1 - t)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_undefined_ends_give_no_predictor() -> None:
    assert make_predictor("clean", 0, trail(), 0.0, DEPTH, 0.0) is None
    assert make_predictor("noise", 0, trail(), 1.0, DEPTH, 0.0) is None
    assert make_predictor("output", 0, Trail(DEPTH), 0.5, DEPTH, 0.0) is None


def test_gain_and_alignment_are_those_of_the_tensors() -> None:
    outputs, samples, new, now = stored()
    found = measured(True)
    change, move, before = new - outputs[0], now - samples[0], samples[0] - samples[1]
    gain = float((change * move).sum() / (move * move).sum())
    cosine = float(torch.cosine_similarity(move.flatten(), before.flatten(), 0))
    assert found.gain() == pytest.approx(gain, rel=1e-4)
    assert found.alignment() == pytest.approx(cosine, abs=1e-5)


def test_without_samples_only_outputs_are_judged() -> None:
    found = measured(False)
    response = make_predictor("response", 0, trail(), NOW, DEPTH, 0.5)
    linear = make_predictor("output", 1, trail(), NOW, DEPTH, 0.0)
    assert response is not None and linear is not None
    assert found.error(response) == math.inf
    assert math.isfinite(found.error(linear))
    assert math.isnan(found.alignment())
    assert found.gain() == 0.0


def test_what_is_not_used_may_hold_anything() -> None:
    found = measured(True, nan_at=2)
    hold = make_predictor("output", 0, trail(), NOW, DEPTH, 0.0)
    quadratic = make_predictor("output", 2, trail(), NOW, DEPTH, 0.0)
    assert hold is not None and quadratic is not None
    assert math.isfinite(found.error(hold))
    assert found.error(quadratic) == math.inf
