"""What the matrix products of a layer cost alone on this machine: no reuse step can be cheaper.

    python benchmarks/floor.py [--shares 0.05 0.1 0.2 0.3] [--threads 1] [--dtype bfloat16]
    ->  table: ms a layer of the products and of SDPA for a share of branches and tokens, times
        cheaper than all of them, and what arithmetic alone would give

The layer is that of `speed_model`: products of experts, shared expert and attention with as many
rows as a step computes. Weights of several layers take turns, so that they come from memory as in a
model. Fewer rows are slower a row: weights have to be read whatever the number of rows, and torch's
products pack them too. The kernel for few rows, which does not, is in the last columns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from models import speed_model
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange

import moeca_compile  # noqa: F401  its ops

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
LAYERS = 4
TOKENS = 256


class Products:
    """The products of one layer of `model` with `share` of `batch` x TOKENS tokens computed."""

    def __init__(self, model: Any, batch: int, share: float) -> None:
        block = model.blocks[0]
        dtype = block.attn.qkv.weight.dtype
        self.dim, self.heads, self.batch = block.attn.proj.in_features, block.attn.heads, batch
        self.rows = max(1, round(share * batch * TOKENS))
        experts = len(block.moe.experts)
        self.branches = max(1, round(share * batch * TOKENS * block.moe.k / experts))  # each
        generator = torch.Generator().manual_seed(0)
        self.inputs = {
            (rows, width): torch.randn(rows, width, generator=generator).to(dtype)
            for rows in (self.rows, self.branches)
            for width in (self.dim, block.moe.shared.down.in_features)
        }
        head = self.dim // self.heads
        self.query = torch.randn(batch, self.heads, max(1, self.rows // batch), head).to(dtype)
        self.key = torch.randn(batch, self.heads, TOKENS, head).to(dtype)

    def linears(self, block: Any) -> list[tuple[int, Tensor]]:
        """(rows, weight) of every product."""
        experts = list(block.moe.experts)
        found = [(self.branches, w) for e in experts for w in (e.gate_up.weight, e.down.weight)]
        shared = block.moe.shared
        attention = (block.attn.qkv.weight, block.attn.proj.weight)
        behind = (shared.gate_up.weight, shared.down.weight, *attention)
        return [*found, *((self.rows, weight) for weight in behind)]

    def flops(self, block: Any) -> int:
        """Multiplications and additions of the products and of SDPA."""
        attention = 4 * self.query.numel() * TOKENS
        return attention + sum(2 * rows * w.numel() for rows, w in self.linears(block))

    def run(self, block: Any, linear: Linear) -> None:
        for rows, weight in self.linears(block):
            linear(self.inputs[rows, weight.shape[1]], weight, None)
        F.scaled_dot_product_attention(self.query, self.key, self.key)


@torch.no_grad()
def measure(
    model: Any, batch: int, shares: Sequence[float], rounds: int
) -> tuple[list[float], list[float]]:
    """Median ms a layer for each share, by torch's products and by the kernel where it is for them;
    all take turns, so that a busy moment hits all."""
    ways: list[Linear] = [F.linear, torch.ops.moeca.few_rows_linear.default]
    sizes = [Products(model, batch, share) for share in shares]
    times: list[list[list[float]]] = [[[] for _ in sizes] for _ in ways]
    for _ in trange(rounds, desc="rounds", ncols=88):
        for number, products in enumerate(sizes):
            for linear, spent in zip(ways, times, strict=True):
                start = time.perf_counter()
                for block in model.blocks:
                    products.run(block, linear)
                spent[number].append(1000 * (time.perf_counter() - start) / LAYERS)
    by_torch, by_kernel = ([median(spent) for spent in way] for way in times)
    return by_torch, by_kernel


def main() -> None:
    parser = argparse.ArgumentParser(description="what the products of a layer cost alone")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.05, 0.1, 0.2, 0.3])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, help="default: what torch takes")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = speed_model(LAYERS, getattr(torch, arguments.dtype))
    shares = [1.0, *arguments.shares]
    found, kernel = measure(model, arguments.batch, shares, arguments.rounds)
    work = [Products(model, arguments.batch, s).flops(model.blocks[0]) for s in shares]
    rows = [
        {
            "share": share,
            "GFLOP": flops / 1e9,
            "ms a layer": ms,
            "GFLOP/s": flops / ms / 1e6,
            "times cheaper": found[0] / ms,
            "by arithmetic": work[0] / flops,
            "kernel, ms": few,
            "kernel, GFLOP/s": flops / few / 1e6,
            "kernel, times cheaper": found[0] / few,
        }
        for share, flops, ms, few in zip(shares, work, found, kernel, strict=True)
    ]
    print(tabulate(rows, headers="keys", floatfmt=".3g"))


if __name__ == "__main__":
    main()
