"""Expert bodies, as modules and as stacked banks of weights, and the shared experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idioms.config import IdiomConfig


class MLPExpert(nn.Module):
    """Two linear layers with biases and a GELU: [T, D] -> [T, D]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, rows: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(rows)))


class SwiGLUExpert(nn.Module):
    """Gated expert without biases: [T, D] -> [T, D]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(rows)) * self.up_proj(rows))


EXPERTS: dict[str, type[MLPExpert] | type[SwiGLUExpert]] = {
    "mlp": MLPExpert,
    "swiglu": SwiGLUExpert,
}


class StackedBank(nn.Module):
    """All experts of a layer as stacked weights `[E, out, in]`; biases for the MLP kind only."""

    def __init__(self, config: IdiomConfig) -> None:
        super().__init__()
        count, dim, hidden = config.num_experts, config.dim, config.hidden
        self.gated = config.expert == "swiglu"
        self.w_in = nn.Parameter(torch.empty(count, hidden * (2 if self.gated else 1), dim))
        self.w_out = nn.Parameter(torch.empty(count, dim, hidden))
        if not self.gated:
            self.b_in = nn.Parameter(torch.empty(count, hidden))
            self.b_out = nn.Parameter(torch.empty(count, dim))

    def activate(self, hidden: Tensor) -> Tensor:
        """The nonlinearity between the two products: [T, hidden or 2 * hidden] -> [T, hidden]."""
        if not self.gated:
            return F.gelu(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up

    def one(self, expert: int | Tensor, rows: Tensor) -> Tensor:
        """Expert number `expert` on `rows [T, D]`, the plain way; for the reference."""
        if self.gated:
            return F.linear(self.activate(F.linear(rows, self.w_in[expert])), self.w_out[expert])
        hidden = F.linear(rows, self.w_in[expert], self.b_in[expert])
        return F.linear(self.activate(hidden), self.w_out[expert], self.b_out[expert])


class SummedExperts(nn.Module):
    """Several shared experts, added."""

    def __init__(self, experts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(experts)

    def forward(self, rows: Tensor) -> Tensor:
        total = self.parts[0](rows)
        for part in self.parts[1:]:
            total = total + part(rows)
        return total


def shared_experts(config: IdiomConfig) -> nn.Module | None:
    """The shared expert of a layer, or the sum of several, or None."""
    make = EXPERTS[config.expert]
    experts: list[nn.Module] = [make(config.dim, config.hidden) for _ in range(config.shared)]
    if not experts:
        return None
    return experts[0] if len(experts) == 1 else SummedExperts(experts)
