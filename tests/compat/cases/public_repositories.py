"""Class-conditional DiTs of public repositories, from local checkouts.

feizc/DiT-MoE (weights split in slices), DSMoE of yhlleo/EfficientMoE (group-limited sigmoid router,
2-d rotary positions), and of KwaiVGI/DiffMoE: its batch-pool routing, expert choice (EC-DiT) and
token choice (TC-DiT).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from compat.case import Built, Case, falling, fill
from compat.checkouts import load
from compat.public_views import expert_choice_view, token_choice_view

STEPS = 8


class Config(dict[str, Any]):
    """Attributes and `get`, as the repositories' configuration objects have them."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


CHOICE = {
    "num_experts": 4,
    "capacity": 2,
    "n_shared_experts": 1,
    "interleave": False,
    "init_MoeMLP": False,
}
GROUPED = {
    **CHOICE,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 2.5,
    "use_shared_expert": True,
    "skip_first2": False,
}


def make(repository: str, folder: str, name: str, *, depth: int = 1, **parameters: Any) -> Built:
    """Blocks of width 32 over 16 tokens."""
    model = load(repository, folder, name).DiT(
        input_size=8, hidden_size=32, depth=depth, num_heads=2, num_classes=10, **parameters
    )
    fill(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    times = [torch.full((2,), 0.9 - 0.06 * i) for i in range(STEPS)]
    calls = falling(sample, times, {"y": torch.tensor([3, 7])}, sample_name="x", time_name="t")
    return model, calls


def case(
    name: str,
    source: str,
    idiom: str,
    file: tuple[str, str],
    *,
    gap: str = "",
    captures: int = 1,
    **parameters: Any,
) -> Case:
    return Case(
        name,
        source,
        idiom,
        partial(make, source.split("/")[1], *file, **parameters),
        moe=1,
        attention=1,
        sample="x",
        condition="y",
        gap=gap,
        view=expert_choice_view if idiom in ("I5", "I7") else token_choice_view,
        captures=captures,
    )


CASES = [
    case("DiT-MoE", "feizc/DiT-MoE", "I1", (".", "models"), num_experts=4, mlp_ratio=2),
    case(
        "DSMoE",
        "yhlleo/EfficientMoE",
        "I2",
        ("DSMoE/models", "models_DSMoE"),
        MoE_config=Config(GROUPED),
        rope_type="2d",
    ),
    case(
        "DSMoE, grouped heads",
        "yhlleo/EfficientMoE",
        "I2",
        ("DSMoE/models", "models_DSMoE"),
        MoE_config=Config(GROUPED),
        rope_type="1d",  # its table is stored by the first forward
        enable_gqa=True,
        captures=2,
    ),
    case(
        "DiffMoE",
        "KwaiVGI/DiffMoE",
        "I7",
        ("models", "models_DiffMoE"),
        MoE_config=Config(CHOICE),
        mlp_ratio=2.0,
    ),
    case(
        "EC-DiT",
        "KwaiVGI/DiffMoE",
        "I5",
        ("models", "models_ECDiT"),
        MoE_config=Config(CHOICE),
        mlp_ratio=2.0,
    ),
    case(
        "TC-DiT",
        "KwaiVGI/DiffMoE",
        "I1",
        ("models", "models_TCDiT"),
        MoE_config=Config({**CHOICE, "interleave": True}),  # without, it does not start
        depth=2,
        gap="attention of its first block, which has no experts, is not cached",
        use_swiglu=True,
        mlp_ratio=2,
    ),
]
