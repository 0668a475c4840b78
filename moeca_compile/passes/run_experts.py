"""Expert outputs of some rows in a variant under construction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..graph.evaluate import Evaluator
from ..graph.experts import ExpertRows, SortedRows, per_expert
from ..graph.region import MoERegion


def run_experts(
    evaluator: Evaluator, region: MoERegion, rows: list[Tensor], groups: SortedRows
) -> Tensor:
    """Expert outputs of rows sorted by expert: [R, D]."""
    body, _, _, params = region.routed.args
    body = getattr(evaluator.gm, str(body.target))  # type: ignore[union-attr]
    values = cast(Sequence[Any], torch.fx.map_arg(params, evaluator.value))
    return ExpertRows(body, rows, [per_expert(p) for p in values], groups).run()
