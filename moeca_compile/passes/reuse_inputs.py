"""What a reuse step is given: cached rows, and how many of them a budget allows to compute.

budget 0.1, 2 samples of 16 tokens with 2 branches each  ->  4 branches and 2 tokens a sample
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .cache_plan import LayerPlan
from .row_forecast import CachedRows

MIN_ROWS = 2  # Inductor specialises sizes 0 and 1: fewer rows are padded, padding is not stored


@dataclass(frozen=True)
class ReuseInputs:
    """Cached rows, and under a budget how many branches and tokens of each sample to compute.

    touched: the most tokens of a sample that so many branches can belong to. Counts are int64
    scalars on the CPU: the graph reads them without waiting for a device; or numbers, where CUDA
    graphs want every size fixed.
    """

    rows: CachedRows
    branches: Tensor | int | None
    tokens: Tensor | int | None
    touched: Tensor | int | None

    @property
    def caches(self) -> dict[str, Tensor]:
        return self.rows.caches

    @property
    def counts(self) -> tuple[Tensor | int | None, ...]:
        """All counts."""
        return self.branches, self.tokens, self.touched


def allowed_counts(layers: Sequence[LayerPlan], budget: float) -> list[list[int]]:
    """Per layer the branches of each group and the tokens of each sample that a budget allows, and
    the tokens of a sample that these branches can belong to at most.

    At least two: smaller sizes would be specialised.
    """
    found = []
    for sizes in map(counted_sizes, layers):
        branches, tokens = (max(MIN_ROWS, math.ceil(budget * s - 1e-9)) for s in sizes[:2])
        found.append([branches, tokens, min(sizes[1], branches * sizes[2])])
    return found


def counted_sizes(layer: LayerPlan) -> tuple[int, int, int]:
    """What a layer's counts depend on besides the budget: branches of a group, tokens of a sample,
    and the groups whose branches may all be one sample's (one where groups are samples)."""
    region, samples = layer.region, layer.region.space.samples
    mixed = 1 if region.groups == samples else region.groups
    return layer.branches // region.groups, layer.tokens // samples, mixed
