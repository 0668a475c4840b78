"""How the reference takes a model apart: one view per block layout, row-wise pieces only.

    Block.forward(x, c)  ->  attention_input(x, c) [B, N, D] -> heads -> attend -> project
                             expert_input(x, c) [T, Din] -> route -> expert(e, rows), shared(rows)

Two layouts are known: `tests/idioms` and `examples/fashion_ditmoe`. Both views compute in the dtype
of the weights; casts to float32 inside the models' routers are left out on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn


class BlockView(Protocol):
    """The pieces of one block. B samples, N tokens, T = B * N; `c [B, D]` is the conditioning."""

    num_experts: int
    top_k: int

    def attention_input(self, x: Tensor, c: Tensor) -> Tensor:
        """What attention is called on: x [B, N, D] -> [B, N, D]."""
        ...

    def heads(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Operands of attention, final (normalised, rotated): q, k, v, each [B, H, N, d]."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of every query, output projection included: [B, N, D]."""
        ...

    def add_attention(self, x: Tensor, attn: Tensor, c: Tensor) -> Tensor:
        """Residual add of attention, gate included."""
        ...

    def expert_input(self, x: Tensor, c: Tensor) -> Tensor:
        """Rows that router and experts see: x [B, N, D] -> [T, Din]."""
        ...

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [T, K] and expert ids [T, K]."""
        ...

    def expert(self, index: int, rows: Tensor) -> Tensor:
        """One expert on all rows: [T, Din] -> [T, D]."""
        ...

    def shared(self, rows: Tensor) -> Tensor:
        """The shared experts on all rows, zeros without any: [T, Din] -> [T, D]."""
        ...

    def add_experts(self, x: Tensor, moe: Tensor, c: Tensor) -> Tensor:
        """Residual add of the mixture's output moe [T, D], gate included."""
        ...


class ChoiceBlockView(BlockView, Protocol):
    """A block whose experts pick tokens; without `route` and `top_k`."""

    def picks(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Who has whom, and the weights, zero elsewhere: [B, N, Din] -> [T, E] each."""
        ...


class ModelView(Protocol):
    """A whole denoiser: embed, blocks, finish."""

    @property
    def blocks(self) -> Sequence[BlockView]: ...

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Token stream [B, N, D] and conditioning vector [B, D]."""
        ...

    def finish(self, h: Tensor, c: Tensor) -> Tensor:
        """Token stream to the model's output."""
        ...


View = Callable[[nn.Module], ModelView]


class IdiomBlockView:
    """`idioms.denoiser.Block`."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.num_experts = block.moe.num_experts
        self.top_k = block.moe.top_k
        self.labels: Tensor | None = None  # of the call at hand

    def attention_input(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.block.modulate(c)[0:2]
        return self.block.norm1(x) * (1 + scale) + shift

    def heads(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.block.attn.heads(a)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.block.attn.proj(self.block.attn.attend(q, k, v))

    def add_attention(self, x: Tensor, attn: Tensor, c: Tensor) -> Tensor:
        return x + self.block.modulate(c)[2] * attn

    def expert_input(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.block.modulate(c)[3:5]
        return (self.block.norm2(x) * (1 + scale) + shift).flatten(0, 1)

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.block.moe.route(rows, self.labels)

    def picks(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.block.moe.picks(rows)

    def expert(self, index: int, rows: Tensor) -> Tensor:
        return self.block.moe.one_expert(index, rows)

    def shared(self, rows: Tensor) -> Tensor:
        return self.block.moe.shared_rows(rows)

    def add_experts(self, x: Tensor, moe: Tensor, c: Tensor) -> Tensor:
        return x + self.block.modulate(c)[5] * moe.view_as(x)


class FashionBlockView:
    """`examples/fashion_ditmoe/model.py`, class `Block`."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.num_experts = block.moe.n
        self.top_k = block.moe.k

    def modulate(self, c: Tensor) -> tuple[Tensor, ...]:
        """Scale, shift, gate of attention, then of the experts, each [B, 1, D]."""
        return self.block.ada(c).unsqueeze(1).chunk(6, dim=-1)

    def attention_input(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.modulate(c)[0:2]
        return self.block.norm1(x) * (1 + scale) + shift

    def heads(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, d = a.shape
        count = self.block.attn.heads
        q, k, v = self.block.attn.qkv(a).view(b, n, 3, count, d // count).permute(2, 0, 3, 1, 4)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v)
        return self.block.attn.proj(out.transpose(1, 2).flatten(2))

    def add_attention(self, x: Tensor, attn: Tensor, c: Tensor) -> Tensor:
        return x + self.modulate(c)[2] * attn

    def expert_input(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.modulate(c)[3:5]
        return (self.block.norm2(x) * (1 + scale) + shift).flatten(0, 1)

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        probs = F.linear(rows, self.block.moe.router.weight).softmax(-1)
        weights, ids = probs.topk(self.top_k, dim=-1)
        if self.block.moe.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, ids

    def expert(self, index: int, rows: Tensor) -> Tensor:
        return self.block.moe.experts[index](rows)

    def shared(self, rows: Tensor) -> Tensor:
        return self.block.moe.shared(rows)

    def add_experts(self, x: Tensor, moe: Tensor, c: Tensor) -> Tensor:
        return x + self.modulate(c)[5] * moe.view_as(x)


class IdiomModelView:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks = [IdiomBlockView(block) for block in model.blocks]

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            block.labels = y
        return self.model.embed(x, t, y)

    def finish(self, h: Tensor, c: Tensor) -> Tensor:
        return self.model.finish(h, c)


class FashionModelView:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks: list[BlockView] = [FashionBlockView(block) for block in model.blocks]

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        # The time embedder computes its angles in float32 whatever the weights; here too.
        model = self.model
        return model.embed(model.patchify(x)) + model.pos, model.t_embed(t) + model.y_embed(y)

    def finish(self, h: Tensor, c: Tensor) -> Tensor:
        model = self.model
        scale, shift = model.ada(c).unsqueeze(1).chunk(2, dim=-1)
        return model.unpatchify(model.head(model.norm(h) * (1 + scale) + shift))


def view_of(model: nn.Module) -> ModelView:
    """The view that fits `model` by its attributes; TypeError for an unknown layout."""
    if hasattr(model, "finish") and hasattr(model, "modulation_out"):
        return IdiomModelView(model)
    if hasattr(model, "patchify") and hasattr(model, "ada"):
        return FashionModelView(model)
    raise TypeError(f"no reference view for {type(model).__name__}")
