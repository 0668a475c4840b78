"""HiDream's image transformer: joint text-image blocks, then blocks over one stream of both."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from compat.case import Built, Case, falling, fill

STEPS = 8


class Packed(nn.Module):
    """The transformer behind a packing of the latents into rows, as its own `patchify` does it.

    Called with rows, positions and sizes it reads no size from a tensor on its way out.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, sample: Tensor, timesteps: Tensor, **texts: Tensor) -> Tensor:
        b, channels, height, width = sample.shape
        h, w = height // 2, width // 2
        pixels = sample.reshape(b, channels, h, 2, w, 2).permute(0, 2, 4, 3, 5, 1)
        place = torch.stack([torch.zeros(h * w), *self.grid(h, w)], dim=-1)
        return self.transformer(
            hidden_states=pixels.reshape(b, h * w, 4 * channels),
            timesteps=timesteps,
            img_ids=place.expand(b, -1, -1),
            img_sizes=[(h, w)] * b,
            hidden_states_masks=torch.ones(b, h * w),
            return_dict=False,
            **texts,
        )[0]

    def grid(self, h: int, w: int) -> list[Tensor]:
        """Row and column of each patch."""
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        return [rows.flatten().float(), columns.flatten().float()]


def make(packed: bool, joint: int = 1, single: int = 1) -> Built:
    """So many joint blocks and blocks over a single stream; 16 image tokens, texts of 4 tokens."""
    from diffusers import HiDreamImageTransformer2DModel

    model = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=joint,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[12, 20],
        text_emb_dim=24,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(16, 16),
        llama_layers=list(range(joint + single)),
    )
    fill(model, seed=0)
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    fixed = {
        "encoder_hidden_states_t5": noise(2, 4, 12),
        "encoder_hidden_states_llama3": noise(joint + single, 2, 4, 20),
        "pooled_embeds": noise(2, 24),
    }
    times = [torch.full((2,), 900 - 60 * i) for i in range(STEPS)]
    sample = noise(2, 4, 8, 8)
    name = "sample" if packed else "hidden_states"
    fixed = fixed if packed else {**fixed, "return_dict": False}
    calls = falling(sample, times, fixed, sample_name=name, time_name="timesteps")
    return Packed(model) if packed else model, calls


def case(name: str, packed: bool) -> Case:
    return Case(
        name,
        "diffusers",
        "I1",
        partial(make, packed),
        moe=2,
        attention=2,
        sample="sample" if packed else "hidden_states",
        condition="pooled_embeds",
    )


CASES = [
    case("HiDream image transformer, packed latents", True),
    case("HiDream image transformer, as its pipeline calls it", False),
]
