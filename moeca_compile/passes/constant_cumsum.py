"""Cumulative sums of constants keep the integer dtype they were asked for.

Inductor replaces a cumulative sum of equal constants by arithmetic on int64, whatever integer dtype
was asked for (torch 2.13), and a grouped product then refuses its offsets.

    before:  cumsum(full([E], c), 0, dtype=int32)
    after:   to(cumsum(full([E], c), 0), int32)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ..graph.dataflow import ancestors
from .base import PassReport

aten = torch.ops.aten
_NARROW = (torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class ConstantCumsum:
    """Cast cumulative sums of constants instead of asking for a narrow dtype."""

    name: str = "constant_cumsum"

    def run(self, gm: GraphModule) -> PassReport:
        found = [n for n in gm.graph.nodes if _is_narrow(n)]
        for node in found:
            _cast_after(gm, node)
        if found:
            gm.graph.lint()
            gm.recompile()
        return PassReport(self.name, len(found))


def _is_narrow(node: Node) -> bool:
    if node.target is not aten.cumsum.default or node.kwargs.get("dtype") not in _NARROW:
        return False
    return not any(n.op in ("placeholder", "get_attr") for n in ancestors([node]))


def _cast_after(gm: GraphModule, node: Node) -> None:
    """int64 sums cut to the narrow dtype are the narrow sums: both wrap around."""
    dtype = node.kwargs["dtype"]
    with gm.graph.inserting_after(node):
        cast = gm.graph.call_function(aten.to.dtype, (node, dtype))
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    cast.meta = dict(node.meta)
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "dtype"}
    node.meta["val"] = node.meta["val"].to(torch.int64)
