"""One number for the noise level of a call, whatever the caller passed.

0.5, 999, tensor(999), tensor([999, 999])   ->  (999.0, "")
None, tensor([]), tensor([999, 500]), nan   ->  (None, "timestep_unknown" | "mixed_timesteps" | ...)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

UNKNOWN = "timestep_unknown"
MIXED = "mixed_timesteps"
NOT_FINITE = "timestep_not_finite"


def judge_timestep(values: Sequence[float]) -> tuple[float | None, str]:
    """(the common value, "") of the batch's timesteps, or (None, why there is none)."""
    if not values:
        return None, UNKNOWN
    first = values[0]
    if not all(map(math.isfinite, values)):
        return None, NOT_FINITE
    if len(values) > 1 and values.count(first) != len(values):
        return None, MIXED
    return float(first), ""


def read_numbers(timestep: object, chords: Tensor | None) -> tuple[list[float], list[float]]:
    """Timesteps and chords [R] as Python numbers, with at most one device read for both."""
    if not isinstance(timestep, Tensor):
        return _number(timestep), [] if chords is None else chords.tolist()
    flat = timestep.detach().reshape(-1)
    if chords is None:
        return flat.tolist(), []
    if flat.is_cpu or flat.device != chords.device:
        return flat.tolist(), chords.tolist()
    exact = torch.float32 if flat.device.type == "mps" else torch.float64
    both = torch.cat([flat.to(exact), chords.to(exact)]).tolist()
    return both[: len(both) - chords.numel()], both[len(both) - chords.numel() :]


def _number(value: object) -> list[float]:
    if isinstance(value, bool):
        return []
    return [float(value)] if isinstance(value, (Real, torch.SymInt, torch.SymFloat)) else []
