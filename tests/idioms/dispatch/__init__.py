"""Mixture-of-experts layers, one file per dispatch idiom; all `forward(x [B, N, D]) -> [B, N, D]`.

Token choice (`DISPATCHES` but not `EXPERT_CHOICE`) also has `route(rows, labels)`,
`one_expert(e, rows)` and `shared_rows(rows)` for the reference; expert choice `picks(x)` instead of
`route`.
"""

from idioms.dispatch.base import MoELayer
from idioms.dispatch.choice import ExpertChoiceMoE, GroupedChoiceMoE, IndexedChoiceMoE
from idioms.dispatch.gathered import GatheredMoE
from idioms.dispatch.grouped import GroupedMoE
from idioms.dispatch.hits import HitListMoE, StackedHitListMoE
from idioms.dispatch.labelled import PrototypeMoE
from idioms.dispatch.masks import MaskLoopMoE
from idioms.dispatch.pool import BatchPoolMoE
from idioms.dispatch.slices import CapacitySliceMoE, SliceLoopMoE
from idioms.dispatch.split import SplitMoE

DISPATCHES: dict[str, type[MoELayer]] = {
    "I1": SliceLoopMoE,
    "I1_capacity": CapacitySliceMoE,
    "split": SplitMoE,
    "I2": HitListMoE,
    "I2_stacked": StackedHitListMoE,
    "I3": MaskLoopMoE,
    "I4": PrototypeMoE,
    "I5": ExpertChoiceMoE,
    "I6": IndexedChoiceMoE,
    "I6_grouped": GroupedChoiceMoE,
    "I7": BatchPoolMoE,
    "I8": GatheredMoE,
    "I9": GroupedMoE,
}
EXPERT_CHOICE = ("I5", "I6", "I6_grouped", "I7")

__all__ = ["DISPATCHES", "EXPERT_CHOICE", "MoELayer"]
