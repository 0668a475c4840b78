"""Ordinary functions of x [B, N, D] whose rows do not depend on each other, rule by rule."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from graph.pushing import SAMPLES, SELECTIONS, TOKENS, WIDTH, Pushed, push, tensor, tokens

aten = torch.ops.aten
W = tensor(WIDTH, WIDTH, seed=1)
BIAS = tensor(WIDTH, seed=2)
POSITIONS = tensor(TOKENS, WIDTH, seed=3)
MODULATION = tensor(SAMPLES, WIDTH, seed=4)
TEXT = tensor(SAMPLES, 5, WIDTH, seed=12)
JOINT_POSITIONS = tensor(1, 5 + TOKENS, WIDTH, seed=13)

# name -> function of x [B, N, D] whose rows must go all the way to x, in both forms of selection.
PUSHED: dict[str, Callable[[Tensor], Tensor]] = {
    # rows of another stream beside the tokens
    "text behind, sliced": lambda x: F.silu(torch.cat([F.linear(x, W), TEXT], 1))[:, :TOKENS],
    "text in front, split": lambda x: F.linear(torch.cat([TEXT, x], 1), W).split([5, TOKENS], 1)[1],
    "text in front, last rows": lambda x: F.silu(torch.cat([TEXT, x], 1))[:, -TOKENS:] * 2,
    "joint positions": lambda x: (torch.cat([TEXT, x], 1) * JOINT_POSITIONS).narrow(1, 5, TOKENS),
    "joint heads": lambda x: torch.cat([TEXT, x], 1)
    .view(SAMPLES, -1, 2, WIDTH // 2)
    .transpose(1, 2)[:, :, 5:]
    .transpose(1, 2)
    .flatten(2),
    # pointwise, with and without the tag
    "gelu": lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "silu": lambda x: F.silu(x) * torch.sigmoid(1.702 * x) + F.softplus(x),
    "relu": lambda x: aten.relu.default(x) + aten.hardswish.default(x) + aten.mish.default(x),
    "arithmetic": lambda x: (1 - x) / 2 + x**2 + 2**x - x.abs() ** 0.5 + x % 2 + x // 2,
    "clamp": lambda x: x.clamp(-1, 1) + x.clamp_min(0) + torch.nan_to_num(x) + torch.tanh(x),
    "where": lambda x: torch.where(x > 0, x, 0.0) + torch.where(x > 0, 1.0, x),
    "where tensors": lambda x: torch.where(x > 0, POSITIONS, x),
    "where scalars": lambda x: torch.where(x > 0, 1.0, 2.0).double(),
    "masked_fill": lambda x: x.masked_fill(x > 0, 1.0).masked_fill(x < -1, BIAS.sum()),
    "second names": lambda x: torch.where(
        torch.greater(x, 0) | torch.less(x, -1), torch.multiply(x, x), torch.negative(x)
    )
    + torch.subtract(torch.absolute(x), x)
    + torch.true_divide(x, 2)
    + torch.divide(x, 2 + x * x)
    + torch.where(torch.isclose(x, x), torch.not_equal(x, 0), F.logsigmoid(x)),
    "fused": lambda x: torch.lerp(x, x * 2, 0.5) + torch.addcmul(x, x, x) + torch.square(x),
    "cast": lambda x: x.float().double() + x.half().type_as(W) + aten.to.other(x.float(), W[0]),
    "cast, exact form": lambda x: aten._to_copy.default(x, dtype=torch.float32).double(),
    "device": lambda x: x.to("cpu") + x.to(device="cpu", dtype=torch.float64),
    "copies": lambda x: x.clone() + x.contiguous() + aten.alias.default(x) + x.detach(),
    "dropout off": lambda x: F.dropout(x, 0.5, False) + F.dropout(x, 0.0, True),
    "constants": lambda x: x + torch.zeros_like(x) + torch.ones_like(x) + torch.full_like(x, 3.0),
    "complex": lambda x: torch.complex(x, x * 2).conj().resolve_conj().imag
    + torch.polar(x, x).real,
    # operands that broadcast
    "positions": lambda x: x * POSITIONS + POSITIONS[None],
    "modulation": lambda x: x * (1 + MODULATION.unsqueeze(1)) + MODULATION[:, None, :],
    "both": lambda x: x * (POSITIONS[None] + MODULATION.unsqueeze(1)),
    "row vector": lambda x: x * BIAS + x * x.mean(-1, keepdim=True),
    "sample mask": lambda x: x * (MODULATION[:, :1, None] > 0),
    "token mask": lambda x: x * (POSITIONS[:, 0] > 0)[None, :, None],
    "in order": lambda x: x + torch.arange(TOKENS)[:, None],
    # products
    "linear": lambda x: F.linear(F.linear(x, W, BIAS), W),
    "matmul": lambda x: x @ W + torch.matmul(x, W.t()),
    "matmul over heads": lambda x: (x.view(2, 6, 2, 4) @ W[:4, :4]).flatten(2),
    "matmul per row": lambda x: (x.view(2, 6, 4, 2) @ x.view(2, 6, 2, 4)).flatten(2),
    "mm": lambda x: torch.mm(x.reshape(12, 8), W).view(2, 6, 8),
    "addmm": lambda x: torch.addmm(BIAS, x.flatten(0, 1), W).unflatten(0, (2, 6)),
    "addmm of rows": lambda x: torch.addmm(x.flatten(0, 1), x.flatten(0, 1), W, beta=2),
    "baddbmm": lambda x: torch.baddbmm(
        x.view(12, 1, 8), x.view(12, 1, 8), x.view(12, 8, 1) * BIAS
    ).view(2, 6, 8),
    "einsum": lambda x: torch.einsum("bnd,ed->bne", x, W),
    "einsum, ellipsis": lambda x: torch.einsum("... d, ed -> ... e", x, W),
    "einsum of rows": lambda x: torch.einsum("bnd,bne->bnde", x, x).flatten(2),
    # mixing along free dims
    "norms": lambda x: F.layer_norm(x, (8,), BIAS, BIAS) + F.rms_norm(x, (8,), BIAS),
    "norms without weight": lambda x: F.layer_norm(x, (8,)) + F.rms_norm(x, (8,), eps=1e-3),
    "qk norm": lambda x: F.rms_norm(x.view(2, 6, 2, 4), (4,), BIAS[:4]).flatten(2),
    "rms by hand": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * BIAS,
    "group norm of rows": lambda x: F.group_norm(x.view(12, 8), 2, BIAS, BIAS).view(2, 6, 8),
    "softmax": lambda x: x.softmax(-1) + F.log_softmax(x, -1) + x.softmax(dim=2),
    "softmax, other forms": lambda x: aten._softmax.default(x, -1, False)
    + aten._safe_softmax.default(x, -1),
    "cumulated": lambda x: x.cumsum(-1) + x.cumprod(2) + x.flip(-1) + x.roll(3, -1),
    "reductions": lambda x: torch.stack(
        [
            x.sum(-1), x.mean(2), x.amax(-1), x.amin(-1), x.prod(-1), x.logsumexp(-1),
            x.var(-1), x.var(dim=-1, correction=0), x.std(-1), x.std(dim=-1, correction=0),
            x.max(-1)[0], x.min(-1)[0], x.argmax(-1), x.argmin(-1),
            torch.var_mean(x, -1)[1], torch.var_mean(x, dim=-1, correction=0)[0],
            (x > 0).any(-1), (x > 0).all(-1),
        ],
        -1,
    ),
    "reductions kept": lambda x: x.sum(-1, keepdim=True) + x.amax(-1, True)
    + x.std(-1, keepdim=True),
    "reduction of two dims": lambda x: x.view(2, 6, 2, 4).sum((-1, -2)) + x.mean((2,)),
    "vector norms": lambda x: F.normalize(x, dim=-1) + x.norm(dim=-1, keepdim=True)
    + torch.linalg.norm(x, dim=-1, keepdim=True) + aten.norm.ScalarOpt_dim(x, 2, [-1], True),
    # parts and joins of free dims
    "select": lambda x: x[..., 3] * x.select(2, 1),
    "slice": lambda x: x[..., ::2] + x[:, :, 4:] + x.narrow(-1, 2, 4),
    "chunk": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "split": lambda x: x.split(4, -1)[1] + x.split([3, 4, 1], -1)[1],
    "split, other forms": lambda x: aten.split.sizes(x, [2, 6], -1)[1].sum(-1)
    + x.tensor_split(3, -1)[0].sum(-1) + x.tensor_split([3], -1)[1].sum(-1),
    "unbind": lambda x: torch.stack(x.view(2, 6, 2, 4).unbind(2), 0).sum(0),
    "glu": lambda x: F.glu(x, -1),
    "cat": lambda x: torch.cat([x, x[..., :3], F.silu(x)], dim=-1),
    "cat, other names": lambda x: torch.concat([x, x], -1) + torch.concatenate([x, x], dim=2),
    "stack": lambda x: torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2),
    "index_select": lambda x: x.index_select(-1, torch.tensor([5, 0, 0])),
    "indexing": lambda x: x[..., torch.tensor([5, 0, 0])]
    + x[:, :, torch.tensor([[1, 2, 3]])][:, :, 0],
    "gather": lambda x: x.gather(-1, x.argsort(-1)) + x.sort(-1)[0],
    "gather some": lambda x: x.gather(2, x.topk(3, -1)[1]) - x.topk(3)[0],
    "repeat": lambda x: x.repeat(1, 1, 2) + x.tile(2) + x.repeat_interleave(2, dim=-1),
    "repeat of new dims": lambda x: x.repeat(3, 1, 1, 1).sum(0),
    "pad": lambda x: F.pad(x, (1, 2)) + aten.constant_pad_nd.default(x, [0, 3, 0, 0], 1.0),
    "embedding": lambda x: F.embedding((x[..., 0] > 0).long(), W) * W[(x[..., 1] > 0).long()],
    "one_hot": lambda x: F.one_hot((x[..., 0] > 0).long(), 3).double(),
    # views
    "views": lambda x: x.view(2, 6, 2, 4).reshape(12, 8).view_as(x).reshape_as(x),
    "unsafe view": lambda x: aten._unsafe_view.default(x, [12, 8]).unflatten(0, (2, 6)),
    "regrouped": lambda x: x.view(2, 6, 2, 4).transpose(2, 3).reshape(2, 6, 2, 4).flatten(-2),
    "free dims cut anew": lambda x: F.silu(x.view(2, 6, 2, 4)).reshape(2, 6, 4, 2).flatten(2),
    "permute": lambda x: x.view(2, 6, 2, 4).permute(2, 0, 3, 1).permute(1, 3, 0, 2).flatten(2),
    "transpose": lambda x: F.silu(x.transpose(1, 2)).mT.swapaxes(0, 1).swapdims(1, 0),
    "movedim": lambda x: x.movedim(1, 2).movedim((2, 0), (0, 1)).transpose(0, 1),
    "moveaxis": lambda x: torch.moveaxis(torch.moveaxis(x, 0, -1), (2, 0), (0, 1)),
    "t": lambda x: F.silu(x.reshape(12, 8).t()).t() + F.silu(x.reshape(12, 8).T).T,
    "squeeze": lambda x: x[:, None].squeeze(1) + x.unsqueeze(-1).squeeze((-1, -2)) + x.squeeze(0),
    "squeeze all": lambda x: x.view(2, 1, 6, 1, 8).squeeze(),
    "expand": lambda x: x.unsqueeze(2).expand(-1, -1, 3, -1).flatten(2)
    + x.unsqueeze(0).expand(3, 2, 6, 8).permute(1, 2, 0, 3).flatten(2),
    "expand, other names": lambda x: x[..., None].broadcast_to(2, 6, 8, 3).sum(-1)
    + x[..., :1].expand_as(x),
    "complex views": lambda x: torch.view_as_real(
        torch.view_as_complex(x.reshape(2, 6, 4, 2))
        * torch.view_as_complex(POSITIONS.view(6, 4, 2))
    ).flatten(2),
    "tokens in front": lambda x: (
        F.linear(x.transpose(0, 1), W) + POSITIONS[:, None] + MODULATION
    ).transpose(0, 1),
}  # fmt: skip


@cache
def pushed_through(name: str, form: str) -> Pushed:
    return push(PUSHED[name], tokens(), selection=SELECTIONS[form])
