"""A forward for training that sorts the branches by expert: same mathematics, known loads.

A branch is one (token, slot) pair of the top-k choice. The dispatch loops of the example models
index and add row by row, also in their backward; a permutation and its inverse only copy rows. It
also keeps what router balancing needs and the models do not expose: the tokens, and the loads.

    tokens [T, D], ids [T, K] -> branches [T * K, D] in order of their expert
    each expert runs on one slice -> inverse permutation -> [T, K, D] -> weighted sum over K
"""

from types import MethodType

import torch
from torch import Tensor, nn


class _Permute(torch.autograd.Function):
    """rows[order], whose backward gathers with the inverse instead of adding row by row."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def sorted_forward(moe: nn.Module, x: Tensor) -> Tensor:
    """x [B, N, D] -> [B, N, D]; leaves `moe.tokens` [T, D] and `moe.load` [E] (branches)."""
    moe.tokens = tokens = x.reshape(-1, x.shape[-1])
    gates, ids = moe.router(tokens)
    branch = ids.reshape(-1)
    order = branch.argsort()
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    moe.load = torch.bincount(branch, minlength=len(moe.experts))

    copies = tokens[:, None].expand(-1, ids.shape[1], -1).reshape(len(branch), -1)
    parts = _Permute.apply(copies, order, inverse).split(moe.load.tolist())
    results = torch.cat([expert(part) for expert, part in zip(moe.experts, parts)])
    slots = _Permute.apply(results, inverse, order).view(*ids.shape, -1)  # [T, K, D]
    out = (gates.to(slots.dtype).unsqueeze(1) @ slots).squeeze(1)
    return (out + moe.shared(tokens)).view(x.shape)


def use_sorted_dispatch(model: nn.Module, moe_class: type[nn.Module]) -> list[nn.Module]:
    """Give every MoE layer of `model` the sorted forward; the layers, in order."""
    layers = [module for module in model.modules() if isinstance(module, moe_class)]
    for layer in layers:
        layer.forward = MethodType(sorted_forward, layer)
    return layers
