"""The mixture-of-experts layer of HunyuanImage-3.0, from a checkout, inside our minimal denoiser.

Its forward selects a CUDA device and opens profiler ranges. Both are stood in for in the imported
module's names, so that the layer runs on a CPU; its code stays as it is.
"""

from __future__ import annotations

import contextlib
import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from compat.case import Built, Case
from compat.checkouts import load
from compat.minimal_dit import DIM, EXPERTS, HIDDEN, TOP_K, ForeignMoE, denoiser

GAP = "tokens are dealt out by an einsum over a capacity that is read on the host"


class Hunyuan(ForeignMoE):
    """Renormalised softmax, one shared expert, nothing dropped: the capacity is the top load."""

    def __init__(self) -> None:
        for library in ("transformers", "diffusers"):  # they ask what is there: no stand-in, please
            importlib.import_module(library)
        models: Any = load("HunyuanImage-3.0", "hunyuan_image_3", "hunyuan")
        models.nvtx = SimpleNamespace(range=lambda *_: contextlib.nullcontext())
        models.torch = without_devices()
        config = SimpleNamespace(
            hidden_size=DIM, intermediate_size=HIDDEN, moe_intermediate_size=HIDDEN,
            num_shared_expert=1, hidden_act="silu", mlp_bias=False, moe_topk=TOP_K,
            moe_drop_tokens=False, moe_random_routing_dropped_token=False, num_experts=EXPERTS,
            routed_scaling_factor=1.0, n_group=None, topk_group=None, norm_topk_prob=True,
            group_limited_greedy=False, capacity_factor=1.0, use_mixed_mlp_moe=True,
            moe_impl="eager",
        )  # fmt: skip
        layer: nn.Module = models.HunyuanMoE(config, layer_idx=0)
        super().__init__(layer)

    def router(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("not captured: no reference follows it")


def without_devices() -> ModuleType:
    """torch, but selecting a CUDA device does nothing."""
    stand_in: Any = ModuleType("torch")
    vars(stand_in).update(vars(torch))
    stand_in.cuda = SimpleNamespace(set_device=lambda *_: None)
    return stand_in


def make() -> Built:
    """One block with the layer."""
    return denoiser(Hunyuan)


CASES = [
    Case(
        "HunyuanImage-3.0 layer",
        "Tencent-Hunyuan/HunyuanImage-3.0",
        "einsum over a capacity",
        make,
        moe=1,
        attention=1,
        sample="x",
        condition="y",
        gap=GAP,
    )
]
