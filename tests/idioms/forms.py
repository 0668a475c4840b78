"""How blocks of real models use attention: several streams, masks, no modulation, long skips.

model = make_form("joint", seed=0)            # forward(x, t, y) as `Denoiser`
Text rows are made from the label y, M of them; experts see the image rows, unless said otherwise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idioms.config import IdiomConfig
from idioms.denoiser import Denoiser
from idioms.dispatch import DISPATCHES

TEXT = 5


class FormBlock(nn.Module):
    """adaLN, attention of the form, experts. Subclasses write `forward(x, text, c)`."""

    def __init__(self, config: IdiomConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads, self.width = config.heads, config.head_dim
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.Linear(dim, dim)
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.moe = DISPATCHES[config.idiom](config)

    def modulate(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.modulation(F.silu(c)).unsqueeze(1).chunk(6, dim=-1)

    def split(self, rows: Tensor) -> Tensor:
        """[B, M, D] -> [B, H, M, d]."""
        return rows.unflatten(-1, (self.heads, self.width)).transpose(1, 2)

    def merged(self, out: Tensor) -> Tensor:
        return out.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, N, D], text [B, M, D], c [B, D] -> both streams."""
        shift, scale, gate, shift_m, scale_m, gate_m = self.modulate(c)
        seen, text = self.attend(self.norm1(x) * (1 + scale) + shift, text)
        x = x + gate * seen
        return x + gate_m * self.moe(self.norm2(x) * (1 + scale_m) + shift_m), text

    def attend(self, a: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """What the image rows saw, and the next text."""
        raise NotImplementedError


class Joint(FormBlock):
    """Both streams in one attention, each with projections of its own; text has a plain MLP."""

    image_first = True

    def __init__(self, config: IdiomConfig) -> None:
        super().__init__(config)
        dim = config.dim
        self.text_qkv, self.text_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.text_up, self.text_down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.register_buffer("angle", torch.empty(config.tokens + TEXT, config.head_dim // 2))

    def rotate(self, rows: Tensor) -> Tensor:
        """rows [B, H, N + M, d], as complex numbers, turned by their position."""
        turn = torch.polar(torch.ones_like(self.angle), self.angle)
        pairs = torch.view_as_complex(rows.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    def attend(self, a: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        mine = self.norm_q(self.to_q(a)), self.norm_k(self.to_k(a)), self.to_v(a)
        theirs = self.text_qkv(text).chunk(3, dim=-1)
        streams = (mine, theirs) if self.image_first else (theirs, mine)
        q, k, v = (self.split(torch.cat(pair, dim=1)) for pair in zip(*streams, strict=True))
        out = self.merged(F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v))
        sizes = [s[0].shape[1] for s in streams]
        parts = out.split(sizes, dim=1)
        seen, read = parts if self.image_first else parts[::-1]
        text = text + self.text_out(read)
        return self.to_out(seen), text + self.text_down(F.silu(self.text_up(text)))


class TextFirst(Joint):
    """The same with the text rows in front, taken apart by slices."""

    image_first = False

    def attend(self, a: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        mine = self.norm_q(self.to_q(a)), self.norm_k(self.to_k(a)), self.to_v(a)
        theirs = self.text_qkv(text).chunk(3, dim=-1)
        q, k, v = (self.split(torch.cat(p, dim=1)) for p in zip(theirs, mine, strict=True))
        out = self.merged(F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v))
        return self.to_out(out[:, TEXT:]), text + self.text_out(out[:, :TEXT])


class OneProjection(FormBlock):
    """The streams are joined before one shared projection, and taken apart behind another."""

    def attend(self, a: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.cat([text, a], dim=1)
        q, k, v = self.split(self.to_q(rows)), self.split(self.to_k(rows)), self.to_v(rows)
        out = self.to_out(self.merged(F.scaled_dot_product_attention(q, k, self.split(v))))
        return out[:, TEXT:], text + out[:, :TEXT]


class TextKeys(FormBlock):
    """Image queries over image and text keys, fewer heads of keys; text stays as it is."""

    def __init__(self, config: IdiomConfig) -> None:
        super().__init__(config)
        dim = config.dim
        self.to_k, self.to_v = nn.Linear(dim, dim // 2), nn.Linear(dim, dim // 2)
        self.text_k, self.text_v = nn.Linear(dim, dim // 2), nn.Linear(dim, dim // 2)

    def attend(self, a: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        keys = torch.cat([self.to_k(a), self.text_k(text)], dim=1).unflatten(-1, (-1, self.width))
        values = torch.cat([self.to_v(a), self.text_v(text)], dim=1)
        keys = keys.repeat_interleave(2, dim=2).transpose(1, 2)
        values = values.unflatten(-1, (-1, self.width)).repeat_interleave(2, dim=2).transpose(1, 2)
        q = self.split(self.norm_q(self.to_q(a)))
        return self.to_out(self.merged(F.scaled_dot_product_attention(q, keys, values))), text


class Cross(FormBlock):
    """Self-attention, then attention to the text, each with a residual; no modulation at all."""

    def __init__(self, config: IdiomConfig) -> None:
        super().__init__(config)
        dim = config.dim
        self.cross_q, self.cross_out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.cross_k, self.cross_v = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_cross = nn.LayerNorm(dim)

    def forward(self, x: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        a = self.norm1(x) + c[:, None]
        q, k, v = self.split(self.to_q(a)), self.split(self.to_k(a)), self.split(self.to_v(a))
        x = x + self.to_out(self.merged(F.scaled_dot_product_attention(q, k, v)))
        q = self.split(self.cross_q(self.norm_cross(x)))
        k, v = self.split(self.cross_k(text)), self.split(self.cross_v(text))
        x = x + self.cross_out(self.merged(F.scaled_dot_product_attention(q, k, v)))
        return x + self.moe(self.norm2(x)), text


class Masked(FormBlock):
    """A mask of the model's own, added to the scores by the fused kernel."""

    def attend(self, a: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.split(self.to_q(a)), self.split(self.to_k(a)), self.split(self.to_v(a))
        place = torch.arange(a.shape[1], device=a.device)
        mask = (place[:, None] - place[None]).abs() < 9
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(self.merged(out)), text


class FormDenoiser(Denoiser):
    """Blocks of one form over an image and a text stream."""

    def __init__(self, config: IdiomConfig, block: type[FormBlock]) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList([block(config) for _ in range(config.depth)])
        self.y_text = nn.Embedding(config.num_classes + 1, TEXT * config.dim)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.embed(x, t, y)
        text = self.y_text(y).unflatten(-1, (TEXT, -1))
        for block in self.blocks:
            h, text = block(h, text, c)
        return self.finish(h, c + text.mean(1))  # both streams count to the end


class TimeToken(FormDenoiser):
    """Timestep and label are two tokens in front, seen by experts too; a skip over all blocks."""

    def __init__(self, config: IdiomConfig, block: type[FormBlock]) -> None:
        super().__init__(config, block)
        self.skip = nn.Linear(2 * config.dim, config.dim)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.embed(x, t, y)
        h = torch.cat([self.t_embed(t)[:, None], self.y_embed(y)[:, None], h], dim=1)
        first = h
        for block in self.blocks:
            h, _ = block(h, h[:, :0], torch.zeros_like(c))
        h = self.skip(torch.cat([h, first], dim=-1))
        return self.finish(h[:, 2:], c)


FORMS: dict[str, tuple[type[FormDenoiser], type[FormBlock]]] = {
    "joint": (FormDenoiser, Joint),
    "text first": (FormDenoiser, TextFirst),
    "one projection": (FormDenoiser, OneProjection),
    "text keys": (FormDenoiser, TextKeys),
    "cross": (FormDenoiser, Cross),
    "masked": (FormDenoiser, Masked),
    "time token": (TimeToken, Masked),
}


def make_form(name: str, *, idiom: str = "I8", depth: int = 1, seed: int = 0) -> FormDenoiser:
    """A denoiser whose blocks have this form; KeyError for an unknown name."""
    from idioms import fill_random

    denoiser, block = FORMS[name]
    config = IdiomConfig(
        idiom=idiom,
        router="softmax_renorm",
        expert="swiglu",
        top_k=2,
        num_experts=6,
        shared=1,
        attention="sdpa",
        dim=32,
        depth=depth,
        heads=4,
        tokens=16,
    )
    model = denoiser(config, block)
    fill_random(model, seed)
    return model.eval().requires_grad_(False)
