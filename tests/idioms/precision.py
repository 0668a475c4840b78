"""The fp32 islands of real models, written so that a float64 copy stays float64."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x.float()` as models write it for routers and softmax, but never a narrowing of float64."""
    return x if x.dtype == torch.float64 else x.float()
