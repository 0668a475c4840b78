"""How a layer's rows are ranked in a reuse step: one selector a region, named by the policy.

    "input_drift"  how far the expert's input has moved since the branch was computed
    "moeca"        the paper's score, of router weights and cached norms
    "value_norm"   1 - |v| / max |v|: tokens with small values (DuCa, arXiv 2412.18911v1)
    "toca"         that, how long ago a token was computed, and spread over the image
                   (ToCa, arXiv 2410.05317, section 3.2)

ToCa's s1 and s2 come from attention maps, which fused attention does not have: value norms stand
for s1, as in DuCa; s2 (cross-attention) is left out, and so are ratios that differ by layer. s4
takes runs of consecutive tokens as cells: the graph does not know the image's grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .reuse_layer import ReuseLayer

moeca = torch.ops.moeca

GIVEN = "given"  # the guard's formula that takes the evidence as the score
STALE_STEP = 0.0625  # for a step without being computed: 0.25 in an interval of four
SPREAD_SHARE = 0.4  # weight of being the first of a cell
CELL = 4  # tokens


@dataclass(frozen=True)
class Selector:
    """formula: of `lowering.guards.score_branches`. tracks_drift, counts_age: state that it needs.

    expert_aware: thresholds differ by expert. token_score: [T], the score of all branches of a
    token, where that is the formula.
    """

    formula: str
    tracks_drift: bool = False
    counts_age: bool = False
    expert_aware: bool = True
    token_score: Callable[[ReuseLayer], Tensor] | None = None


def small_values(layer: ReuseLayer) -> Tensor:
    """1 - |v| / max |v| per sample [T], of V as cached; of attention's output where V is not.

    Zero without attention: all tokens alike.
    """
    plan = layer.layer
    if not plan.attention:
        return torch.zeros(plan.tokens, device=plan.region.routed.meta["val"].device)
    cache = (plan.attention[0].root, *plan.attention[0].key_value)[-1]  # V is the last of them
    rows = moeca.cache_read(layer.inputs.caches[cache.name], plan.tokens)
    size = rows.float().norm(dim=-1).reshape(layer.region.space.samples, -1)
    return (1 - size / size.amax(1, keepdim=True).clamp(min=1e-12)).reshape(-1)


def stale_and_spread(layer: ReuseLayer) -> Tensor:
    """`small_values`, more for every step a token was held, and for the best one of a cell."""
    space = layer.region.space
    each = small_values(layer) + STALE_STEP * layer.cache("token_age")
    each = each.reshape(space.samples, space.tokens)
    cells = -(-space.tokens // CELL)
    padded = torch.nn.functional.pad(each, (0, cells * CELL - space.tokens), value=-1.0)
    best = padded.reshape(space.samples, cells, CELL).amax(2).repeat_interleave(CELL, 1)
    first = each == best.narrow(1, 0, space.tokens)
    return torch.where(first, each + SPREAD_SHARE, each).reshape(-1)


SELECTORS: dict[str, Selector] = {
    "moeca": Selector("moeca"),
    "input_drift": Selector("input_drift", tracks_drift=True),
    "value_norm": Selector(GIVEN, expert_aware=False, token_score=small_values),
    "toca": Selector(GIVEN, counts_age=True, expert_aware=False, token_score=stale_and_spread),
}
