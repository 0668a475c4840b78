"""The probe: small, private, sees every place. The bounds: where each of them begins to act."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moeca_compile.runtime.probe import PROBE_ELEMENTS, chords, judge_chords, take_probe
from runtime.schedules import flow, image, noise


def probe(sample: Tensor) -> Tensor:
    found = take_probe(sample)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "shape",
    [(1,), (1, 4), (3, 5), (2, 4, 32, 32), (8, 4, 64, 64), (125, 4, 32, 32), (600, 3), (2, 513)],
)
def test_probe_is_small_and_of_unit_rows(shape: tuple[int, ...]) -> None:
    rows = probe(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert 0 < rows.numel() <= PROBE_ELEMENTS
    assert rows.numel() >= min(math.prod(shape), PROBE_ELEMENTS) / 4
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(rows.shape[0]))


def test_probe_owns_its_memory() -> None:
    sample = noise(0)
    before = probe(sample)
    kept = before.clone()
    sample.zero_()
    assert torch.equal(before, kept)


def test_probe_of_a_non_contiguous_sample_is_the_same() -> None:
    sample = noise(0)
    assert not sample.transpose(2, 3).transpose(1, 2).is_contiguous()
    channels_last = sample.contiguous(memory_format=torch.channels_last)
    assert not channels_last.is_contiguous()
    torch.testing.assert_close(probe(channels_last), probe(sample))
    view = torch.cat([noise(1), sample])[sample.shape[0] :]
    assert view.storage_offset() > 0
    torch.testing.assert_close(probe(view), probe(sample))


@pytest.mark.parametrize("width", [16, 31, 32, 33, 64])
def test_probe_sees_every_row_and_column_of_the_image(width: int) -> None:
    index = torch.arange(width * width, dtype=torch.float64).view(1, 1, width, width)
    seen = probe(torch.ones(1, 1, width, width)).numel()
    # The coprime stride visits all residues: a change of one column must move the probe.
    columns = {
        c
        for c in range(width)
        if (probe(_bump(index.shape, c)) != probe(torch.ones(index.shape))).any()
    }
    assert len(columns) == min(width, seen)


def _bump(shape: torch.Size, column: int) -> Tensor:
    sample = torch.ones(shape)
    sample[..., column] = 2.0
    return sample


def test_probe_of_nothing_is_none() -> None:
    assert take_probe(torch.empty(0, 4)) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_scale_and_dtype_do_not_matter(dtype: torch.dtype) -> None:
    sample = (noise(0) * 100).to(dtype)
    assert float(chords(probe(sample), probe(sample.float() * 80)).max()) < 1e-3


def test_zero_samples_equal_themselves_and_nothing_else() -> None:
    zero = probe(torch.zeros(2, 64))
    assert float(chords(zero, zero).max()) == 0.0
    assert float(chords(zero, probe(torch.ones(2, 64))).min()) == pytest.approx(1.0)


def test_one_replaced_sample_of_eight_is_seen() -> None:
    old = flow(0.3, 0, batch=8)
    new = flow(0.28, 0, batch=8)
    assert judge_chords(float(chords(probe(old), probe(new)).max()), [0.12]) == "continues"
    assert judge_chords(_whole(old, new), [0.12]) == "continues"
    new[3] = flow(0.28, 9, batch=8)[3]
    assert judge_chords(float(chords(probe(old), probe(new)).max()), [0.12]) == "broken"
    assert judge_chords(_whole(old, new), [0.12]) == "continues"  # why there are rows


def _whole(old: Tensor, new: Tensor) -> float:
    return float(chords(probe(old.reshape(1, -1)), probe(new.reshape(1, -1))).max())


def test_nan_is_unclear() -> None:
    bad = noise(0)
    bad[:] = float("nan")
    worst = float(chords(probe(noise(0)), probe(bad)).max())
    assert judge_chords(worst, [0.1]) == "unclear"


@pytest.mark.parametrize(
    ("chord", "recent", "expected"),
    [
        (0.34, [], "continues"),
        (0.36, [], "unclear"),
        (1.01, [], "broken"),
        (1.01, [0.9], "broken"),
        (0.09, [0.001], "continues"),
        (0.11, [0.001], "broken"),
        (0.29, [0.1, 0.001], "continues"),
        (0.31, [0.1, 0.001], "broken"),
        (0.49, [0.3], "continues"),
        (0.51, [0.3], "unclear"),
        (0.61, [0.3], "broken"),
        (0.31, [0.9, 0.1, 0.1, 0.1, 0.1], "broken"),
    ],
)
def test_bounds(chord: float, recent: list[float], expected: str) -> None:
    assert judge_chords(chord, recent) == expected
    vouched = judge_chords(chord, recent, vouched=True)
    assert vouched == ("broken" if chord > 1 else "continues")


def test_images_share_enough_that_a_fixed_bound_would_not_do() -> None:
    near_clean = chords(probe(flow(0.05, 0)), probe(flow(0.05, 1)))
    assert float(near_clean.max()) < 1.0  # the jump ratio, not the fixed bound, has to catch this
    assert image(0).mean() > 0.2
