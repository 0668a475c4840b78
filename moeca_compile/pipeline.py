"""The order of everything between Dynamo's graph and Inductor, in one place.

    Dynamo graph -> retrace -> PASSES -> match_regions -> plan_cache -> variants (lowering)

The runner verifies the graph after every pass, times it and dumps it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from .debug.dump import Dumper
from .debug.region_table import region_table
from .graph.region import NoMatch, Regions
from .graph.retrace import AtenGraph, retrace
from .options import Options
from .passes.base import Pass, PassReport
from .passes.cache_plan import CachePlan, plan_cache, plan_nothing
from .passes.constant_cumsum import ConstantCumsum
from .passes.dense_selections import DenseSelections
from .passes.distinct_experts import DistinctExperts
from .passes.fit_cache import fit_cache
from .passes.match_regions import match_regions
from .passes.normalize_attention import NormalizeAttention
from .passes.normalize_choice import NormalizeChoice
from .passes.normalize_experts import NormalizeExperts
from .passes.normalize_gathered import NormalizeGathered
from .passes.normalize_grouped import NormalizeGrouped
from .passes.normalize_pool import NormalizePool
from .passes.verify import verify

PASSES: tuple[Pass, ...] = (
    DenseSelections(),
    NormalizePool(),
    NormalizeChoice(),
    NormalizeExperts(),
    NormalizeGathered(),
    NormalizeGrouped(),
    DistinctExperts(),
    NormalizeAttention(),
    ConstantCumsum(),
)


@dataclass(frozen=True)
class Analysis:
    """One graph after all passes: what was found in it and what it will keep between steps."""

    aten: AtenGraph
    regions: Regions
    plan: CachePlan
    reports: tuple[PassReport, ...]

    @property
    def missed(self) -> tuple[NoMatch, ...]:
        return tuple(m for r in self.reports for m in r.missed) + self.regions.missed

    @property
    def normalized(self) -> int:
        """Places where passes changed the graph."""
        return sum(r.changed for r in self.reports)


def analyse(gm: GraphModule, values: Sequence[Any], options: Options, dumper: Dumper) -> Analysis:
    """Run every stage up to the cache plan. Raises Untraceable or PassError."""
    dumper.reproducer(gm, values, options)
    dumper.graph("dynamo", gm)
    started = time.perf_counter()
    aten = retrace(gm, values)
    dumper.graph("aten", aten.gm, _since(started))
    reports = []
    for each in PASSES:
        started = time.perf_counter()
        report = each.run(aten.gm)
        verify(aten.gm, each.name)
        reports.append(report)
        dumper.graph(each.name, aten.gm, _since(started), f"{report.changed} changed")
    regions = match_regions(aten.gm)
    plan = _plan(regions, aten, options)
    found = Analysis(aten, regions, plan, tuple(reports))
    dumper.regions(aten.gm, lambda: region_table(regions, plan), regions, found.missed)
    return found


def _plan(regions: Regions, aten: AtenGraph, options: Options) -> CachePlan:
    """A graph without a matched MoE layer is cached only where the user named a policy: nobody who
    left the choice to the default asked for a dense denoiser, or whatever this is, to be cached."""
    if not regions.moe and not options.policy_named:
        return plan_nothing(regions)
    return fit_cache(plan_cache(regions, aten, options), regions, aten, options)


def _since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
