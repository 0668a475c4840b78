"""Tiny re-creations of dispatch idioms found in the wild, written for these tests.

Every model is a stack of residual MoE layers inside a small denoiser `model(x [B, N, D], t [B])`.
One file, because most idioms are a change to one that stands above them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM = 32
EXPERTS = 4
SLOTS = 2


class Mlp(nn.Module):
    """SwiGLU expert on rows [R, D]."""

    def __init__(self, dim: int = DIM, hidden: int = 24) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class SlicedMlp(nn.Module):
    """Expert whose weights are split in slices, as for tensor parallelism."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, 24, bias=False)
        self.down = nn.Linear(24, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up = torch.cat([F.linear(x, w) for w in self.up.weight.split(12, 0)], -1).split(12, -1)
        return sum(F.linear(F.gelu(a), w) for a, w in zip(up, self.down.weight.split(12, 1)))


class ConditionedMlp(Mlp):
    """Expert that also takes the sample's conditioning, one row per token row."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Linear(DIM, DIM)

    def forward(
        self, x: Tensor, c: Tensor, scale: float = 1.0, table: Tensor | None = None
    ) -> Tensor:
        y = super().forward(x + self.shift(c)) * scale
        return y if table is None else y + table.sum(0)


class SortedLoop(nn.Module):
    """argsort, counts on the host, loop over slices, gate in place, scatter_reduce_ (I1)."""

    expert_class: type[nn.Module] = Mlp

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, EXPERTS, bias=False)
        self.bank = nn.ModuleList([self.expert_class() for _ in range(EXPERTS)])
        self.common = Mlp()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        weights, chosen = self.gate(flat).softmax(-1).topk(SLOTS, -1)
        y = self.run_routed(flat, chosen.view(-1), weights.view(-1, 1)).view(x.shape)
        return y + self.common(x)

    @torch.no_grad()
    def run_routed(self, rows: Tensor, picks: Tensor, gates: Tensor) -> Tensor:
        total = torch.zeros_like(rows)
        order = picks.argsort()
        ends = picks.bincount().cpu().numpy().cumsum(0)
        owners = order // SLOTS
        for number, end in enumerate(ends):
            start = 0 if number == 0 else ends[number - 1]
            if start == end:
                continue
            part = owners[start:end]
            out = self.bank[number](rows[part])
            out.mul_(gates[order[start:end]])
            total = total.to(out.dtype)
            total.scatter_reduce_(0, part.view(-1, 1).repeat(1, DIM), out, reduce="sum")
        return total


class SlicedSortedLoop(SortedLoop):
    expert_class = SlicedMlp


class ConditionedSortedLoop(SortedLoop):
    """I1 whose experts take a second row-aligned input, a keyword constant and a shared table."""

    expert_class = ConditionedMlp

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3, DIM))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        cond = c.unsqueeze(1).expand_as(x).reshape(-1, DIM)
        weights, chosen = self.gate(flat).softmax(-1).topk(SLOTS, -1)
        args = (flat, cond, chosen.view(-1), weights.view(-1, 1), self.table)
        return self.run_conditioned(*args).view(x.shape)

    @torch.no_grad()
    def run_conditioned(
        self, rows: Tensor, cond: Tensor, picks: Tensor, gates: Tensor, table: Tensor
    ) -> Tensor:
        total = torch.zeros_like(rows)
        order = picks.argsort()
        ends = picks.bincount().cpu().numpy().cumsum(0)
        for number, end in enumerate(ends):
            start = 0 if number == 0 else ends[number - 1]
            if start == end:
                continue
            part = order[start:end] // SLOTS
            out = self.bank[number](rows[part], cond[part], scale=0.5, table=table)
            out.mul_(gates[order[start:end]])
            total.scatter_reduce_(0, part.view(-1, 1).repeat(1, DIM), out, reduce="sum")
        return total


class SplitLoop(nn.Module):
    """sort, bincount, split(tolist), comprehension over zip, inside a bigger forward."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.n = SLOTS, EXPERTS
        self.gate = nn.Linear(DIM, EXPERTS, bias=False)
        self.bank = nn.ModuleList([Mlp() for _ in range(EXPERTS)])
        self.common = Mlp()

    def forward(self, x: Tensor, c: Tensor, record: dict[str, Tensor] | None = None) -> Tensor:
        shape = x.shape
        flat = x.reshape(-1, shape[-1])
        probs = F.linear(flat.float(), self.gate.weight.float()).softmax(-1)
        weight, index = probs.topk(self.k, -1)
        branch = index.reshape(-1)
        order = branch.argsort()
        counts = torch.bincount(branch, minlength=self.n)
        parts = flat.index_select(0, order // self.k).split(counts.tolist())
        out = torch.cat([expert(part) for expert, part in zip(self.bank, parts)])
        out = out.index_select(0, order.argsort()).view(-1, self.k, shape[-1])
        y = (out * weight.unsqueeze(-1).to(out.dtype)).sum(1) + self.common(flat)
        self.balance = None
        if self.training:
            frac = counts.to(probs.dtype) / branch.numel()
            self.balance = self.n * (frac * probs.mean(0)).sum()
        if record is not None:
            record.update(index=index, weight=weight, branch=out)
        return y.view(shape)


class HitBank(nn.ModuleList):
    """A ModuleList that dispatches itself: one_hot, hit list, index_add_ (I2)."""

    def forward(self, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(rows)
        mask = F.one_hot(index, num_classes=len(self)).permute(2, 1, 0)
        hits = (mask.sum(dim=(-1, -2)) > 0).nonzero()
        for hit in hits:
            slot, token = torch.where(mask[hit[0]])
            out = self[int(hit[0])](rows[token]) * weights[token, slot, None]
            total.index_add_(0, token, out.to(rows.dtype))
        return total


class HitList(nn.Module):
    """I2 written out inside a bigger forward."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, EXPERTS, bias=False)
        self.bank = nn.ModuleList([Mlp() for _ in range(EXPERTS)])

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        weights, index = self.gate(flat).softmax(-1).topk(SLOTS, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        total = torch.zeros_like(flat)
        mask = F.one_hot(index, num_classes=EXPERTS).permute(2, 1, 0)
        hits = (mask.sum(dim=(-1, -2)) > 0).nonzero()
        for hit in hits:
            slot, token = torch.where(mask[hit[0]])
            out = self.bank[hit[0]](flat[token]) * weights[token, slot, None]
            total.index_add_(0, token, out.to(total.dtype))
        return total.view(x.shape)


class HitListBank(HitList):
    """I2 in the forward of the container itself."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = HitBank([Mlp() for _ in range(EXPERTS)])

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        weights, index = self.gate(flat).softmax(-1).topk(SLOTS, -1)
        return self.bank(flat, index, weights).view(x.shape)


class MaskLoop(HitList):
    """Rows repeated, a boolean mask per expert, masked assignment, view, weighted sum (I3)."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        weights, index = self.gate(flat).softmax(-1).topk(SLOTS, -1)
        picks = index.view(-1)
        repeated = flat.repeat_interleave(SLOTS, 0)
        out = torch.empty_like(repeated)
        for number, expert in enumerate(self.bank):
            out[picks == number] = expert(repeated[picks == number]).to(out.dtype)
        total = (out.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)
        return total.view(x.shape)


class AppendLoop(HitList):
    """A list of results per expert, then one cat: the list must vanish with the loop."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        weights, index = self.gate(flat).softmax(-1).topk(SLOTS, -1)
        outs, where = [], []
        for number, expert in enumerate(self.bank):
            token, slot = (index == number).nonzero(as_tuple=True)
            outs.append(expert(flat[token]) * weights[token, slot, None])
            where.append(token)
        return torch.zeros_like(flat).index_add(0, torch.cat(where), torch.cat(outs)).view(x.shape)


class CapacityLoop(SortedLoop):
    """I1 that drops tokens over a capacity which ordinary inputs never reach."""

    capacity = 14

    @torch.no_grad()
    def run_routed(self, rows: Tensor, picks: Tensor, gates: Tensor) -> Tensor:
        total = torch.zeros_like(rows)
        for number, expert in enumerate(self.bank):
            place = (picks == number).nonzero()[: self.capacity, 0]
            part = place // SLOTS
            total.index_add_(0, part, expert(rows[part]) * gates[place])
        return total


class LoadLimit(SplitLoop):
    """Experts silenced over a load taken from the probabilities: only constant rows expose it.

    Probes that reroute `index` cannot see it, since the load does not come from `index`.
    """

    def forward(self, x: Tensor, c: Tensor, record: dict[str, Tensor] | None = None) -> Tensor:
        flat = x.reshape(-1, DIM)
        probs = self.gate(flat).softmax(-1)
        weight, index = probs.topk(self.k, -1)
        load = torch.bincount(probs.argmax(-1), minlength=self.n).tolist()
        branch = index.reshape(-1)
        order = branch.argsort()
        parts = flat.index_select(0, order // self.k).split(
            branch.bincount(minlength=self.n).tolist()
        )
        outs = [e(p) * float(n < 14) for e, p, n in zip(self.bank, parts, load)]
        out = torch.cat(outs).index_select(0, order.argsort()).view(-1, self.k, DIM)
        return (out * weight.unsqueeze(-1)).sum(1).view(x.shape)


class UnequalLoop(SplitLoop):
    """The trained model's dispatch over experts of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = nn.ModuleList([Mlp(hidden=24 + 8 * (i % 2)) for i in range(EXPERTS)])


class Layer(nn.Module):
    def __init__(self, moe: type[nn.Module]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.mix = nn.Linear(DIM, DIM)
        self.moe = moe()
        self.ada = nn.Linear(DIM, 2 * DIM)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, gate = self.ada(F.silu(c)).unsqueeze(1).chunk(2, -1)
        x = x + self.mix(x.mean(1, keepdim=True))
        return x + gate * self.moe(self.norm(x) * (1 + scale), c)


class Denoiser(nn.Module):
    """`layers` residual MoE layers with a conditioning vector made of the timestep."""

    def __init__(self, moe: type[nn.Module], layers: int = 3) -> None:
        super().__init__()
        self.time = nn.Linear(1, DIM)
        self.layers = nn.ModuleList([Layer(moe) for _ in range(layers)])
        self.head = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.time(t[:, None])
        for layer in self.layers:
            x = layer(x, c)
        return self.head(x)


class Dense(nn.Module):
    """No experts at all."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Mlp()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.net(x)


def make(moe: type[nn.Module], layers: int = 3, seed: int = 0) -> Denoiser:
    """A model in eval mode with every parameter filled."""
    torch.manual_seed(seed)
    model = Denoiser(moe, layers)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def inputs(step: int = 0, batch: int = 2, tokens: int = 7) -> tuple[Tensor, Tensor]:
    """x [B, N, D] and t [B] of one step."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(batch, tokens, DIM, generator=generator)
    return x, torch.full((batch,), 1.0 - 0.1 * step)
