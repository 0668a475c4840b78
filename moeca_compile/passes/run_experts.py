"""Expert outputs of some rows in a variant under construction.

grouped_experts(rows, token, ends, parameters, program)     CPU, a plain chain of ops
grouped_linear, pointwise ops, grouped_linear               otherwise
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..graph.evaluate import Evaluator
from ..graph.expert_program import expert_program
from ..graph.experts import ExpertRows, SortedRows, per_expert
from ..graph.region import MoERegion


def run_experts(
    evaluator: Evaluator,
    region: MoERegion,
    rows: list[Tensor],
    token: Tensor,
    groups: SortedRows,
) -> Tensor:
    """Expert outputs [R, D] of the tokens' rows `rows[i][token]`, sorted by expert.

    rows: each [T, *]; token: [R]. On a CPU expert by expert where the body can be run like that.
    """
    body, _, _, params = region.routed.args[:4]
    body = cast(GraphModule, getattr(evaluator.gm, str(body.target)))  # type: ignore[union-attr]
    values = cast(Sequence[Any], torch.fx.map_arg(params, evaluator.value))
    banks = [per_expert(p) for p in values]
    program = expert_program(body, len(rows)) if rows[0].device.type == "cpu" else None
    if program is None:
        picked = [r.index_select(0, token) for r in rows]
        return ExpertRows(body, picked, banks, groups).run()
    flat = [tensor for bank in banks for tensor in bank.tensors]
    counts = [len(bank.tensors) for bank in banks]
    width = int(region.routed.meta["val"].shape[-1])
    return torch.ops.moeca.grouped_experts(rows, token, groups.ends, flat, counts, program, width)
