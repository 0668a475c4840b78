"""Models whose dispatch is ordinary and whose surroundings are not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capture.models import DIM, SLOTS, Denoiser, HitList, Layer, SortedLoop, SplitLoop


class BreakBefore(Denoiser):
    """Breaks the graph before its first layer, in a way no setting helps."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.time(t[:, None])
        torch._dynamo.graph_break()
        for layer in self.layers:
            x = layer(x, c)
        return self.head(x)


class ReadBefore(Denoiser):
    """Reads a number on the host before its first layer."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x * (1.0 + float(t[0])), t)


class WithoutGradients(Denoiser):
    """A root that switches gradients off itself."""

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t)


class CompiledDispatch(SortedLoop):
    """The dispatch method is compiled by the author of the model, on its own."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        weights, chosen = self.gate(flat).softmax(-1).topk(SLOTS, -1)
        y = self.send(flat, chosen.view(-1), weights.view(-1, 1)).view(x.shape)
        return y + self.common(x)

    @torch.compile(backend="eager")
    def send(self, rows: Tensor, picks: Tensor, gates: Tensor) -> Tensor:
        total = torch.zeros_like(rows)
        for number, expert in enumerate(self.bank):
            branch = (picks == number).nonzero()[:, 0]
            part = branch // SLOTS
            total.index_add_(0, part, expert(rows[part]) * gates[branch])
        return total


@torch.compile(backend="eager")
def scaled(x: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale)


class CompiledHelper(SplitLoop):
    """Calls a small function that is compiled on its own."""

    def forward(self, x: Tensor, c: Tensor, record: dict[str, Tensor] | None = None) -> Tensor:
        flat = scaled(x, c.unsqueeze(1)).reshape(-1, DIM)
        weight, index = self.gate(flat).softmax(-1).topk(self.k, -1)
        branch = index.reshape(-1)
        order = branch.argsort()
        counts = torch.bincount(branch, minlength=self.n)
        parts = flat.index_select(0, order // self.k).split(counts.tolist())
        out = torch.cat([expert(part) for expert, part in zip(self.bank, parts)])
        out = out.index_select(0, order.argsort()).view(-1, self.k, DIM)
        return scaled((out * weight.unsqueeze(-1)).sum(1), weight[:, :1]).view(x.shape)


class ThroughSuper(SplitLoop):
    """Does more than the method of its base class, which dispatches and cannot be replaced."""

    def forward(self, x: Tensor, c: Tensor, record: dict[str, Tensor] | None = None) -> Tensor:
        return super().forward(x * (1 + c.unsqueeze(1)), c, record)


class AutocastRouter(HitList):
    """The router asks for float32 inside of any autocast."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        with torch.autocast(device_type=x.device.type, enabled=False):
            logits = F.linear(flat.float(), self.gate.weight.float())
        weights, index = logits.softmax(-1).topk(SLOTS, -1)
        total = torch.zeros_like(flat)
        for number, expert in enumerate(self.bank):
            token, slot = torch.where(index == number)
            total.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return total.view(x.shape)


class ItemIndexed(HitList):
    """Experts looked up by `.item()`."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        weights, index = self.gate(flat).softmax(-1).topk(SLOTS, -1)
        total = torch.zeros_like(flat)
        for number in torch.unique(index):
            token, slot = torch.where(index == number)
            out = self.bank[number.item()](flat[token])
            total.index_add_(0, token, out * weights[token, slot, None])
        return total.view(x.shape)


class InlineBranch(HitList):
    """A branch on an empty selection in the function that dispatches."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        weights, index = self.gate(flat).softmax(-1).topk(SLOTS, -1)
        low = weights[:, 0] < 0.6
        if low.any():
            weights = torch.where(low[:, None], weights * 0.5, weights)
        total = torch.zeros_like(flat)
        for number, expert in enumerate(self.bank):
            token, slot = torch.where(index == number)
            total.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return total.view(x.shape)


class OtherwiseBranch(InlineBranch):
    """A branch that does something where the selection is empty: it has to stay."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        weights, index = self.gate(flat).softmax(-1).topk(SLOTS, -1)
        low = weights[:, 0] < 0.6
        if low.any():
            weights = weights * 0.5
        total = torch.zeros_like(flat)
        for number, expert in enumerate(self.bank):
            token, slot = torch.where(index == number)
            total.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return total.view(x.shape)


class Attending(Layer):
    """A layer with attention; the kernels are chosen by `kernels()`."""

    def __init__(self, moe: type[nn.Module]) -> None:
        super().__init__(moe)
        self.qkv = nn.Linear(DIM, 3 * DIM)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, DIM // 2)).permute(2, 0, 3, 1, 4)
        with torch.backends.cuda.sdp_kernel(enable_flash=False, enable_mem_efficient=False):
            out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(x + self.attend(x), c)


class NewAttending(Attending):
    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, DIM // 2)).permute(2, 0, 3, 1, 4)
        with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
            out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)


class Numbered(Layer):
    """A layer that knows its number, so that no two share compiled code."""

    def __init__(self, moe: type[nn.Module], number: int) -> None:
        super().__init__(moe)
        self.number = number

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(x, c) * (1 + 0.001 * self.number)


def with_layers(model: Denoiser, layers: list[nn.Module]) -> Denoiser:
    """The same denoiser with other layers, their parameters filled."""
    torch.manual_seed(0)
    model.layers = nn.ModuleList(layers)
    for parameter in model.layers.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)
