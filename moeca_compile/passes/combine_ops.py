"""The ops that lead from branch outputs to the sum over branches."""

from __future__ import annotations

import torch

from ..graph.row_rules import VIEWS

aten = torch.ops.aten
CASTS = {aten.to.dtype, aten.type_as.default, aten._to_copy.default, aten.clone.default}
THROUGH = VIEWS | CASTS | {aten.contiguous.default}
PRODUCTS = {aten.mul.Tensor, aten.mul_.Tensor}
CONTRACTIONS = {aten.bmm.default, aten.matmul.default, aten.einsum.default}
# base + rows at their places; functional: retracing leaves no writes in place
ADDS_ROWS = {
    aten.scatter_add.default,
    aten.index_add.default,
    aten.index_put.default,
    aten.scatter_reduce.two,
}
