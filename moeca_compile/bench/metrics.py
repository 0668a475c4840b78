"""How far images moved: paired distances, and the Frechet distance between two crowds.

full, images  [B, C, H, W] float, values spanning `peak` (2.0 for [-1, 1])
mean_squared_error(full, images)  -> 0.00044
to_psnr(0.00044, peak=2.0)        -> 39.6 dB
frechet(moments(a), moments(b))   -> squared distance between two Gaussians
"""

from __future__ import annotations

import importlib.util
import math
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import MoecaError

SSIM_WINDOW = 11  # pixels: the Gaussian of sigma 1.5 of Wang et al. 2004, cut at 3.5 sigma


def mean_squared_error(full: Tensor, images: Tensor) -> float:
    """Mean over every value of the batch, float64. Raises ValueError for unequal shapes."""
    if full.shape != images.shape:
        raise ValueError(
            f"images of {tuple(images.shape)} cannot be compared with {tuple(full.shape)}"
        )
    return (full.double() - images.double()).square().mean().item()


def to_psnr(mse: float, peak: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error; inf for 0, nan for nan."""
    return math.inf if mse == 0 else 10 * math.log10(peak**2 / mse)


def mean_psnr(full: Tensor, images: Tensor, peak: float) -> float:
    """Mean over the images of each one's PSNR, dB: dominated by the good ones, unlike the batch's.

    An image without any error counts as 150 dB, about what float32 can tell apart.
    """
    each = (full.double() - images.double()).square().flatten(1).mean(1)
    return fmean(min(to_psnr(mse, peak), 150.0) for mse in each.tolist())


def relative_error(full: Tensor, images: Tensor) -> float:
    """Norm of the difference over the norm of `full`, over the whole batch."""
    difference = (full.double() - images.double()).norm()
    return (difference / full.double().norm()).item()


def ssim(full: Tensor, images: Tensor, peak: float) -> float | None:
    """Mean structural similarity (Wang et al. 2004, Gaussian window); None for images under 11 px.

    Raises MoecaError without scikit-image.
    """
    if min(full.shape[-2:]) < SSIM_WINDOW:
        return None
    if importlib.util.find_spec("skimage") is None:
        raise MoecaError('SSIM needs scikit-image: pip install "moeca-compile[bench]"')
    from skimage.metrics import structural_similarity

    pairs = zip(full.double().cpu().numpy(), images.double().cpu().numpy())
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return fmean(
        float(structural_similarity(a, b, data_range=peak, channel_axis=0, **settings))  # type: ignore[arg-type]
        for a, b in pairs
    )


class Moments(NamedTuple):
    """Gaussian fitted to features. mean: [F], covariance: [F, F], float64."""

    mean: Tensor
    covariance: Tensor


def moments(features: Tensor) -> Moments:
    """Mean and covariance of features [N, F]. Raises ValueError for fewer than two."""
    if len(features) < 2:
        raise ValueError(f"moments of {len(features)} samples; expected two or more")
    wide = features.double()
    return Moments(wide.mean(0), torch.cov(wide.T))


def frechet(left: Moments, right: Moments) -> float:
    """Squared Frechet distance between two Gaussians (Heusel et al. 2017, eq. 6).

    trace sqrt(A B) is the sum of the roots of the eigenvalues of the symmetric A^1/2 B A^1/2.
    """
    values, vectors = torch.linalg.eigh(left.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ right.covariance @ root).clamp(min=0).sqrt().sum()
    apart = (left.mean - right.mean).square().sum()
    spread = left.covariance.trace() + right.covariance.trace() - 2 * shared
    return (apart + spread).item()
