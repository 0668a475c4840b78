"""Matched regions and near misses as a table, for dumps and explain."""

from __future__ import annotations

from tabulate import tabulate

from ..graph.region import AttentionRegion, Regions, source_line
from ..passes.cache_plan import CachePlan
from ..policies.protocol import Stored


def region_table(regions: Regions, plan: CachePlan) -> str:
    """One line per region: kind, module path, what it is, or why it did not match and where."""
    rows = []
    for moe in regions.moe:
        shape = moe.description
        shape += "; not cached: max_cache_bytes" if moe in plan.left_out else ""
        rows.append(("moe", moe.name, "yes", shape, moe.routed.name))
        for attention in moe.attention:
            what = kept(attention, plan.stored)
            rows.append(("attention", attention.name, "yes", what, attention.root.node.name))
    for miss in regions.missed:
        place = source_line(miss.node) or miss.node.name
        rows.append((miss.kind, miss.name, "no", miss.reason, place))
    headers = ("kind", "module", "matched", "what or why not", "node")
    table = tabulate(
        rows, headers=headers, tablefmt="simple", maxcolwidths=[None, 40, None, 60, 60]
    )
    return f"{table}\n\ncache: {plan.layout.nbytes:,} bytes per lane\n"


def kept(attention: AttentionRegion, stored: Stored) -> str:
    """What of an attention the policy keeps between steps."""
    if stored.rows:
        return "K and V cached" if attention.key_value else "K and V recomputed in full"
    return "output kept" if stored.layers else "only the model's output is kept"
