"""Mixture-of-experts layers, one file per dispatch idiom; all `forward(x [B, N, D]) -> [B, N, D]`.

Each layer also has `router(rows)`, `one_expert(e, rows)` and `shared_rows(rows)` for the reference.
"""

from idioms.dispatch.base import MoELayer
from idioms.dispatch.gathered import GatheredMoE
from idioms.dispatch.grouped import GroupedMoE
from idioms.dispatch.hits import HitListMoE
from idioms.dispatch.slices import CapacitySliceMoE, SliceLoopMoE
from idioms.dispatch.split import SplitMoE

DISPATCHES: dict[str, type[MoELayer]] = {
    "I1": SliceLoopMoE,
    "I1_capacity": CapacitySliceMoE,
    "split": SplitMoE,
    "I2": HitListMoE,
    "I8": GatheredMoE,
    "I9": GroupedMoE,
}

__all__ = ["DISPATCHES", "MoELayer"]
