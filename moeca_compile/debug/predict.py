"""What a step will cost at the chosen options, before anything runs: bounds, not a promise.

full step 2.1 GFLOPs; cached step 0.4 to 0.9 -> with interval 4 a speed-up of 2.3 to 2.8 in FLOPs

Under a budget the number of branches is known; what the threshold rule picks, and in the
router-first order the number of tokens, depends on the data. `stats` reports what really ran.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..options import Options
from ..passes.cache_plan import LayerPlan
from ..passes.count_flops import count_costs
from ..passes.reuse_inputs import MIN_ROWS
from ..pipeline import Analysis
from ..policies import find_policy
from ..runtime.stats import Costs, LayerCost

Bounds = tuple[int, int]


@dataclass(frozen=True)
class Prediction:
    """FLOPs of a full step, and of a cached one at least and at most.

    interval: steps from one refresh to the next at the latest; error bounds may refresh earlier.
    """

    flops_full: float
    flops_cached_min: float
    flops_cached_max: float
    interval: int

    @property
    def speedup_min(self) -> float:
        """Full / cached arithmetic over one interval if every other step costs the most."""
        return self._speedup(self.flops_cached_max)

    @property
    def speedup_max(self) -> float:
        """... if every other step costs the least."""
        return self._speedup(self.flops_cached_min)

    def _speedup(self, reuse: float) -> float:
        cached = self.flops_full + (self.interval - 1) * reuse
        return self.interval * self.flops_full / cached if cached else 1.0

    def to_dict(self) -> dict[str, float]:
        """Every field and both speed-ups by name."""
        return {
            **asdict(self),
            "speedup_min": self.speedup_min,
            "speedup_max": self.speedup_max,
        }

    def __str__(self) -> str:
        low, high = self.flops_cached_min / 1e9, self.flops_cached_max / 1e9
        return (
            f"full step {self.flops_full / 1e9:.3f} GFLOPs, cached step {low:.3f} to {high:.3f}; "
            f"with interval {self.interval}: arithmetic / {self.speedup_min:.2f} to "
            f"{self.speedup_max:.2f}"
        )


def predict(analyses: Sequence[Analysis], options: Options) -> Prediction | None:
    """Sums over the graphs of one model; None if none of them has a layer to cache."""
    cached = [a for a in analyses if a.plan.variants]
    if not cached:
        return None
    full = low = high = 0.0
    for analysis in cached:
        costs = count_costs(analysis.aten, analysis.plan, options)
        full += costs.fixed + sum(cost.full_flops for cost in costs.layers)
        possible = _variants(analysis, costs, options)
        low += min(each[0] for each in possible)
        high += max(each[1] for each in possible)
    return Prediction(full, low, high, find_policy(options.policy)(options).interval)


def _variants(analysis: Analysis, costs: Costs, options: Options) -> list[tuple[float, float]]:
    """Bounds of each kind of step that can run between two refreshes; of a full one if none can."""
    fixed = costs.fixed
    bounds = [_layer(c, p, options) for c, p in zip(costs.layers, analysis.plan.layers)]
    reuse = (fixed + sum(b[0] for b in bounds), fixed + sum(b[1] for b in bounds))
    whole = fixed + sum(cost.full_flops for cost in costs.layers)
    known = {"reuse": reuse, "forecast": (costs.forecast, costs.forecast), "skip": (0.0, 0.0)}
    return [known[kind] for kind in analysis.plan.variants] or [(whole, whole)]


def _layer(cost: LayerCost, plan: LayerPlan, options: Options) -> tuple[float, float]:
    branches, tokens = _branches(plan, options), _tokens(plan, options)
    per_token = cost.token_flops + cost.shared_flops
    low, high = (b * cost.branch_flops + t * per_token for b, t in zip(branches, tokens))
    return low, high


def _branches(plan: LayerPlan, options: Options) -> Bounds:
    groups = plan.region.groups
    if options.budget is None:
        return MIN_ROWS, plan.branches
    exact = groups * _allowed(options.budget, plan.branches // groups)
    return exact, exact


def _tokens(plan: LayerPlan, options: Options) -> Bounds:
    samples, of_sample = plan.region.space.samples, plan.region.space.tokens
    if options.budget is None:
        return samples * MIN_ROWS, plan.tokens
    if options.order == "attention_first":
        exact = samples * _allowed(options.budget, of_sample)
        return exact, exact
    branches = _allowed(options.budget, plan.branches // samples)
    fewest = max(MIN_ROWS, math.ceil(branches / plan.region.top_k))
    return samples * fewest, samples * min(of_sample, branches)


def _allowed(budget: float, rows: int) -> int:
    return max(MIN_ROWS, math.ceil(budget * rows - 1e-9))
