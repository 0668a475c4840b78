"""What the reference keeps of a layer between steps, and what it tells about a step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from reference_options import MethodOptions
from reference_rows import Rows
from reference_views import BlockView

Pairs = set[tuple[int, int]]


@dataclass(frozen=True)
class Forced:
    """What a compiled run selected in one layer: branches as (token, expert id), and token sets.

    `attended` and `shared` are read in the attention-first order only; None leaves the choice to
    the reference. In the router-first order both follow from `computed`.
    """

    computed: Pairs
    attended: set[int] | None = None
    shared: set[int] | None = None


@dataclass(frozen=True)
class LayerState:
    """What a layer keeps between steps. T = B * N, K slots; G key heads of width d."""

    slot_ids: Tensor  # [T, K]
    slot_weight: Tensor  # [T, K] normalised per token
    slot_norm: Tensor  # [T, K]
    slot_drift: Tensor  # [T, K]
    slot_out: Tensor  # [T, K, D]
    token_in: Tensor  # [T, Din]
    token_age: Tensor  # [T] reuse steps since a branch of the token was computed
    shared: Tensor  # [T, D]
    shared_in: Tensor  # [T, Din] input the shared row was computed from
    attn: Tensor  # [B, N, D]
    attn_in: Tensor  # [B, N, D] stream the attention row was computed from
    k: Tensor  # [B, G, N, d]
    v: Tensor  # [B, G, N, d]
    rows: dict[str, Rows] = field(default_factory=dict)  # slot_out, shared, attn, k, v as read


def pairs_of(ids: Tensor, mask: Tensor) -> Pairs:
    """(token, expert id) of every true entry of `mask [T, K]`."""
    return {(t, int(ids[t, j])) for t, j in mask.nonzero().tolist()}


@dataclass(frozen=True)
class ReferenceLayer:
    """What a layer did in one step; the [T, K] fields are in slot order."""

    ids: Tensor  # [T, K] expert of the current branch in this slot
    weights: Tensor  # [T, K] current router weights, unchanged
    matched: Tensor  # [T, K] bool
    scores: Tensor  # [T, K] normalised per sample; zero where not matched
    tau_e: Tensor  # [E]
    computed: Tensor  # [T, K] bool
    dropped: Tensor  # [T, K] bool: unmatched and beyond the budget
    near: Tensor  # [T, K] bool: within the tolerance of the edge of the rule
    tokens_attended: Tensor  # [T] bool
    tokens_shared: Tensor  # [T] bool
    disputed: Pairs  # forced against own choice, near ties left out
    disputed_tokens: set[int]  # the same for the token choices of the attention-first order
    usage: Tensor  # [E, N], C after the step
    state: LayerState  # after the step

    @property
    def pairs(self) -> Pairs:
        """Computed branches as (token, expert id)."""
        return pairs_of(self.ids, self.computed)


@dataclass(frozen=True)
class LayerCall:
    """One call of one layer: x [B, N, D] before the block, c [B, D], C [E, N] before the step."""

    block: BlockView
    x: Tensor
    c: Tensor
    options: MethodOptions
    tolerance: float
    usage: Tensor
    forced: Forced | None
    now: float

    @property
    def samples(self) -> int:
        return self.x.shape[0]

    @property
    def score(self) -> str:
        """What ranks the branches; token-wise policies have their own."""
        own = {"toca": "toca", "duca": "value_norm"}
        return own.get(self.options.policy, self.options.score)

    @property
    def forecast_order(self) -> int:
        return self.options.forecast_order or 0

    def experts(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Expert outputs for `rows [T, Din]` and `ids [T, K]`: [T, K, D]."""
        every = [self.block.expert(e, rows) for e in range(self.block.num_experts)]
        stacked = torch.stack(every, 1)  # [T, E, D]
        return stacked.gather(1, ids.unsqueeze(-1).expand(-1, -1, stacked.shape[-1]))
