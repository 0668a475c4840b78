"""Values inside a compiled step: the graph's outputs, and beside them those of every layer.

    outputs (v,)   ->   (v, attention of layer 0, experts of layer 0, attention of layer 1, ...)

Every variant evaluates the graph's outputs, so a tap shows in each what that variant made of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..graph.layout import row_layout
from ..graph.region import RowRoot
from ..graph.row_cache import RowCache
from ..passes.cache_plan import LayerPlan
from ..pipeline import Analysis

ATTENTION, SHARED, EXPERTS = "attention", "shared expert", "experts"


@dataclass(frozen=True)
class Tap:
    """One value of one layer. number: of the layer in the plan; rows: how its token rows lie."""

    number: int
    layer: str
    part: str
    rows: RowCache

    def by_token(self, value: Tensor) -> Tensor:
        """`value` as float64 rows [T, width]."""
        return self.rows.to_rows(value).double()


def add_taps(analysis: Analysis) -> tuple[Tap, ...]:
    """Make the values of all layers outputs of the graph, in the order in which they are made."""
    taps, nodes = [], []
    for number, layer in enumerate(analysis.plan.layers):
        name = layer.region.name
        for attention in layer.attention:
            taps.append(Tap(number, name, ATTENTION, attention.root))
            nodes.append(attention.root.root.node)
        for shared in layer.shared:
            taps.append(Tap(number, name, SHARED, shared))
            nodes.append(shared.root.node)
        experts = _sum_over_slots(layer)
        if experts is not None:
            taps.append(Tap(number, name, EXPERTS, experts))
            nodes.append(experts.root.node)
    output = analysis.aten.gm.graph.output_node()
    output.args = ((*output.args[0], *nodes),)  # type: ignore[misc]
    analysis.aten.gm.recompile()
    return tuple(taps)


def _sum_over_slots(layer: LayerPlan) -> RowCache | None:
    """The routed experts' sum per token: below the combine, which a reuse step has in slot order.

    None where no node below it has one row a token.
    """
    region = layer.region
    most = layer.tokens * region.routed.meta["val"].shape[-1]
    node = region.combine
    while True:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        layout = row_layout(value.shape, region.space) if value.numel() <= most else None
        if layout is not None:
            return RowCache("experts", RowRoot(node, layout), region.space)
        if not node.users:
            return None
        node = next(iter(node.users))
