"""The invariants every pass must leave behind; the first broken node is reported whole."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ..errors import PassError
from ..graph.experts import routed_experts


def verify(gm: GraphModule, stage: str) -> None:
    """Raises PassError: a node without a value, a call that is no op, a malformed routed node."""
    gm.graph.lint()
    for node in gm.graph.nodes:
        if node.op in ("call_module", "call_method"):
            raise PassError(
                stage, node, expected="an ATen op", found=node.op, next_step="report this graph"
            )
        if node.op == "call_function" and "val" not in node.meta and _returns(node):
            raise PassError(
                stage, node, expected="meta['val']", found="none", next_step="report this graph"
            )
        if node.target is routed_experts:
            ids = node.args[1].meta["val"]  # type: ignore[union-attr]
            if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
                raise PassError(
                    stage,
                    node,
                    expected="router ids [T, K], int32 or int64",
                    found=f"{ids.dtype} {tuple(ids.shape)}",
                    next_step="report this graph",
                )


def _returns(node: Node) -> bool:
    """Whether a node has a value: assertions have none."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or bool(schema.returns)
