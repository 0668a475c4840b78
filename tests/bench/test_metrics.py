"""Distances against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from moeca_compile.bench.metrics import (
    Moments,
    frechet,
    mean_psnr,
    mean_squared_error,
    moments,
    relative_error,
    ssim,
    to_psnr,
)


def images(seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_constant_error_has_a_known_psnr() -> None:
    full = images()
    assert mean_squared_error(full, full + 0.1) == pytest.approx(0.01, rel=1e-5)
    assert to_psnr(0.01, peak=2.0) == pytest.approx(10 * math.log10(400))
    assert to_psnr(0.0, peak=2.0) == math.inf
    assert relative_error(full, 1.25 * full) == pytest.approx(0.25, rel=1e-6)


def test_mean_psnr_is_that_of_the_images_not_of_the_batch() -> None:
    full = torch.zeros(2, 1, 4, 4)
    off = torch.stack([torch.full((1, 4, 4), 0.2), torch.full((1, 4, 4), 0.02)])
    each = [10 * math.log10(4 / 0.04), 10 * math.log10(4 / 0.0004)]
    assert mean_psnr(full, off, 2.0) == pytest.approx(sum(each) / 2, rel=1e-6)
    assert to_psnr(mean_squared_error(full, off), 2.0) == pytest.approx(each[0] + 2.967, abs=0.01)
    assert mean_psnr(full, full, 2.0) == 150.0


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 1, 16, 16\) cannot be compared"):
        mean_squared_error(images(), images()[:2])


def test_ssim_is_one_for_equal_images_and_follows_its_formula() -> None:
    pytest.importorskip("skimage")
    full = images()
    assert ssim(full, full, 2.0) == pytest.approx(1.0)
    flat, other = torch.full((1, 1, 16, 16), 0.5), torch.full((1, 1, 16, 16), 0.25)
    c1 = (0.01 * 2.0) ** 2  # without variance only the luminance term is left
    expected = (2 * 0.5 * 0.25 + c1) / (0.5**2 + 0.25**2 + c1)
    assert ssim(flat, other, 2.0) == pytest.approx(expected, rel=1e-6)
    assert ssim(full[..., :8], full[..., :8], 2.0) is None


def test_frechet_of_two_gaussians() -> None:
    zero, one = torch.zeros(3).double(), torch.eye(3).double()
    near = Moments(zero, one)
    assert frechet(near, near) == pytest.approx(0.0, abs=1e-9)
    moved = Moments(zero + 2.0, 9.0 * one)  # |2|^2 * 3 + (3 - 1)^2 * 3
    assert frechet(near, moved) == pytest.approx(24.0)
    assert frechet(moved, near) == pytest.approx(24.0)


def test_frechet_of_covariances_that_do_not_commute() -> None:
    left = torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double()
    right = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double()
    roots = torch.linalg.eigvals(left @ right).real.sqrt().sum()
    expected = (left.trace() + right.trace() - 2 * roots).item()
    zero = torch.zeros(2).double()
    assert frechet(Moments(zero, left), Moments(zero, right)) == pytest.approx(expected)


def test_moments_are_those_of_the_samples() -> None:
    features = torch.tensor([[0.0, 1.0], [2.0, 5.0]])
    found = moments(features)
    assert found.mean.tolist() == [1.0, 3.0]
    assert found.covariance.tolist() == [[2.0, 4.0], [4.0, 8.0]]
    with pytest.raises(ValueError, match="two or more"):
        moments(features[:1])
