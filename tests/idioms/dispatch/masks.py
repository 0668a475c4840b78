"""Idiom I3: rows repeated per slot, a boolean mask per expert, masked assignment."""

from __future__ import annotations

import torch
from torch import Tensor

from idioms.dispatch.base import MoELayer


class MaskLoopMoE(MoELayer):
    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, ids = self.router(flat)
        picks = ids.view(-1)
        repeated = flat.repeat_interleave(self.top_k, dim=0)
        out = torch.empty_like(repeated)
        for number, expert in enumerate(self.experts):
            out[picks == number] = expert(repeated[picks == number]).to(out.dtype)
        y = (out.view(*weights.shape, -1) * weights.unsqueeze(-1).to(out.dtype)).sum(dim=1)
        if self.shared is not None:
            y = y + self.shared(flat)
        return y.view_as(x)
