"""Recorded arguments cut to fewer samples: checks run experts on every row, many times.

    x [8, 256, 384], c [8, 384], freqs [256, 64]   ->   x [2, 256, 384], c [2, 384], freqs [256, 64]

What shares its first dimension with the token rows is cut. Code that does not take that raises, or
computes something else for both sides of a comparison; the caller compares whole arguments last.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..torch_compat import leaves, map_leaves

_ROWS = 128  # enough to tell values apart
_ROWS_PER_EXPERT = 16  # enough for every expert to receive some
_SAMPLES = 2  # one alone would not tell a batch from a single vector


def fewer_rows(recorded: Any, experts: int, *, samples: int = _SAMPLES) -> Any | None:
    """`recorded` with fewer samples, at least `samples`; None where that saves less than half."""
    tensors = [leaf for leaf in leaves(recorded)[0] if isinstance(leaf, Tensor)]
    rows = next((t for t in tensors if t.dim() > 1 and t.is_floating_point()), None)
    if rows is None:
        return None
    given, each = rows.shape[0], math.prod(rows.shape[1:-1])
    wanted = max(_ROWS, _ROWS_PER_EXPERT * experts)
    kept = max(samples, math.ceil(wanted / max(1, each)))
    if 2 * kept > given:
        return None

    def cut(leaf: Any) -> Any:
        aligned = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == given
        return leaf[:kept] if aligned else leaf

    return map_leaves(cut, recorded)
