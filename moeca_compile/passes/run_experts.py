"""Expert outputs of some rows in a variant under construction.

grouped_experts(rows, token, ends, parameters, program)     CPU, a plain chain of ops, many rows
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
from ..lowering import few_rows, native

# What all experts make of their rows: below, it stays near the processor anyway, and Inductor's
# fused kernels beat one call after another (docs/speed.md has the figures).
STAYS_IN_CACHE = 12 * 2**20  # bytes
# With the kernel for few rows, products of all experts are faster up to so many times that. With
# AVX2 it ends where the C library begins to map and clear such a value anew in every step; with
# AVX-512 the kernel gains more than that costs.
WITH_KERNEL: dict[str | None, int] = {"AVX2": 2, "AVX512": 4}


def run_experts(
    evaluator: Evaluator,
    region: MoERegion,
    rows: list[Tensor],
    token: Tensor,
    groups: SortedRows,
    expected: float,
) -> Tensor:
    """Expert outputs [R, D] of the tokens' rows `rows[i][token]`, sorted by expert.

    rows: each [T, *]; token: [R]; expected: about how many rows there will be. On a CPU many rows
    are run expert by expert, where the body can be run like that.
    """
    body, _, _, params = region.routed.args[:4]
    body = cast(GraphModule, getattr(evaluator.gm, str(body.target)))  # type: ignore[union-attr]
    values = cast(Sequence[Any], torch.fx.map_arg(params, evaluator.value))
    banks = [per_expert(p) for p in values]
    kernel = native.capability() if few_rows.suits(rows[0]) else None
    near = STAYS_IN_CACHE * WITH_KERNEL.get(kernel, 1)
    by_expert = rows[0].device.type == "cpu" and expected * _bytes_a_row(body) > near
    program = expert_program(body, len(rows)) if by_expert else None
    if program is None:
        picked = [r.index_select(0, token) for r in rows]
        return ExpertRows(body, picked, banks, groups).run()
    flat = [tensor for bank in banks for tensor in bank.tensors]
    counts = [len(bank.tensors) for bank in banks]
    width = int(region.routed.meta["val"].shape[-1])
    return torch.ops.moeca.grouped_experts(rows, token, groups.ends, flat, counts, program, width)


def _bytes_a_row(body: GraphModule) -> float:
    """Of the largest value that an expert makes of its rows."""
    nodes = body.graph.nodes
    tokens = next(n for n in nodes if n.op == "placeholder").meta["val"].shape[0]
    made = [n.meta["val"] for n in nodes if n.op == "call_function"]
    by_row = [v for v in made if isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == tokens]
    return max((v.nbytes for v in by_row), default=0) / tokens
