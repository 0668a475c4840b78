"""Third-party models for `moeca bench`, from installed packages, small to a quarter of full width.

    moeca bench benchmarks/thirdparty.py:joint_tiny
    moeca bench benchmarks/thirdparty.py:joint_eighth --steps 12

joint: HiDream's image transformer, joint text-image blocks and then blocks over one stream. pool:
NucleusMoE's, expert choice.
Weights are random, none is zero. Without diffusers the command ends with a line that says so.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]

try:
    from compat.case import fill
    from compat.cases.hidream import Packed
except ImportError as missing:
    raise click.UsageError(f"third-party models need pytest and a checkout: {missing}") from missing

Call = tuple[nn.Module, dict[str, Any]]


def joint_tiny() -> Call:
    """Two joint blocks and two over one stream, width 64, 64 image tokens."""
    return _joint(blocks=2, heads=4, head_dim=16, axes=(4, 6, 6), side=16, text=(64, 96), tokens=16)


def joint_eighth() -> Call:
    """Width 320 of 2560, 2 + 4 blocks of 16 + 32, 1024 image tokens of 4096."""
    return _joint(
        blocks=2, heads=5, head_dim=64, axes=(32, 16, 16), side=64, text=(512, 512), tokens=32
    )


def _joint(
    *, blocks: int, heads: int, head_dim: int, axes: tuple[int, ...], side: int,
    text: tuple[int, int], tokens: int,
) -> Call:  # fmt: skip
    model = _diffusers().HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        num_layers=blocks,
        num_single_layers=2 * blocks,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        caption_channels=list(text),
        text_emb_dim=256,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=axes,
        max_resolution=(side, side),
        llama_layers=list(range(3 * blocks)),
    )
    fill(model, seed=0)
    noise = _noise()
    inputs = {
        "sample": noise(2, 16, side, side),
        "timesteps": torch.full((2,), 1000.0),
        "encoder_hidden_states_t5": noise(2, tokens, text[0]),
        "encoder_hidden_states_llama3": noise(3 * blocks, 2, tokens, text[1]),
        "pooled_embeds": noise(2, 256),
    }
    packed = Packed(model)
    packed.peers = {"cache-dit": _cache_dit}  # type: ignore[assignment]
    return packed, inputs


def pool_tiny() -> Call:
    """Two blocks, width 64, 64 image tokens."""
    return _pool(blocks=2, heads=4, key_heads=2, head_dim=16, axes=(4, 6, 6), experts=6, side=8)


def pool_eighth() -> Call:
    """Width 256 of 2048, 4 blocks of 32, 16 experts of 64, 256 image tokens of 4096."""
    return _pool(
        blocks=4, heads=4, key_heads=2, head_dim=64, axes=(16, 24, 24), experts=16, side=16
    )


def pool_quarter() -> Call:
    """Width 512 of 2048, 4 blocks of 32, 16 experts of 64, 1024 image tokens of 4096."""
    return _pool(
        blocks=4, heads=8, key_heads=4, head_dim=64, axes=(16, 24, 24), experts=16, side=32
    )


def _pool(
    *, blocks: int, heads: int, key_heads: int, head_dim: int, axes: tuple[int, ...], experts: int,
    side: int,
) -> Call:  # fmt: skip
    from importlib import import_module

    _diffusers()
    module = import_module("diffusers.models.transformers.transformer_nucleusmoe_image")
    model = module.NucleusMoEImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=blocks,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        joint_attention_dim=256,
        axes_dims_rope=axes,
        dense_moe_strategy="all_moe",
        num_experts=experts,
        moe_intermediate_dim=2 * heads * head_dim,
        capacity_factors=2.0,
        use_grouped_mm=False,
    )
    fill(model, seed=0)
    noise = _noise()
    return model, {
        "hidden_states": noise(2, side * side, 64),
        "timestep": torch.full((2,), 0.9),
        "encoder_hidden_states": noise(2, 16, 256),
        "img_shapes": (1, side, side),
        "return_dict": False,
    }


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise click.UsageError("this model needs diffusers: pip install diffusers") from error
    return diffusers


def _noise() -> Any:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return noise


def _cache_dit(model: nn.Module) -> Any:
    """Caching of whole blocks by another package, eager, as it comes: its defaults, but that one
    block tells whether to compute the others, since these models have fewer than its eight.

    Its first eight steps of a generation are computed: give it twenty or more.
    """
    import cache_dit

    config = cache_dit.DBCacheConfig(Fn_compute_blocks=1)
    cache_dit.enable_cache(model.transformer, cache_config=config)
    before = 0.0

    def denoise(**inputs: Tensor) -> Tensor:
        nonlocal before
        now = float(inputs["timesteps"].max())
        if now > before:  # another generation
            cache_dit.refresh_context(model.transformer, cache_config=config)
        before = now
        return model(**inputs)

    return denoise
