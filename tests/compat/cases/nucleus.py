"""NucleusMoE's image transformer: expert choice, image queries over image and text keys."""

from __future__ import annotations

from functools import partial

import torch

from compat.case import Built, Case, falling, fill

STEPS = 8


def make(grouped: bool) -> Built:
    """One block, grouped key heads; 16 image tokens, 5 text tokens. grouped: bfloat16."""
    from diffusers.models.transformers import transformer_nucleusmoe_image

    model = transformer_nucleusmoe_image.NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        joint_attention_dim=20,
        axes_dims_rope=(4, 6, 6),
        dense_moe_strategy="all_moe",
        num_experts=6,
        moe_intermediate_dim=32,
        capacity_factors=2.0,
        use_grouped_mm=grouped,
    )
    fill(model, seed=0)
    dtype = torch.bfloat16 if grouped else torch.float32
    generator = torch.Generator().manual_seed(1)
    fixed = {
        "encoder_hidden_states": torch.randn(2, 5, 20, generator=generator).to(dtype),
        "img_shapes": (1, 4, 4),
        "return_dict": False,
    }
    times = [torch.full((2,), 0.9 - 0.06 * i) for i in range(STEPS)]
    sample = torch.randn(2, 16, 16, generator=generator).to(dtype)
    calls = falling(sample, times, fixed, sample_name="hidden_states", time_name="timestep")
    return model.to(dtype), calls


def case(name: str, grouped: bool, tolerance: float) -> Case:
    return Case(
        f"NucleusMoE image transformer, {name}",
        "diffusers",
        "I6",
        partial(make, grouped),
        moe=1,
        attention=1,
        sample="hidden_states",
        condition="encoder_hidden_states",
        tolerance=tolerance,
    )


CASES = [case("loop", False, 1e-5), case("grouped_mm", True, 2e-2)]
