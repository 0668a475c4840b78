"""The kernels for few rows and few queries against torch's, alone.

    python benchmarks/kernels.py [--dtype bfloat16] [--threads 1] [--rounds 9]
    ->  table: time of eight products, one an expert, by rows an expert: torch, kernel, their ratio;
        weights stored [O, I] and, where there is a kernel for that, [I, O]
        table: time of one attention by queries a sample, the same

Candidates take turns, so that a busy moment hits both; medians. Three sets of weights take turns,
too, so that they come from memory as in a model. Says so where this machine has no kernel.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from models import machine
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from moeca_compile.lowering import few_queries, few_rows, native

EXPERTS = 8
WIDTHS = [(384, 2048), (1024, 384), (768, 4096), (2048, 768)]  # inputs, outputs
ROWS = [26, 51, 102, 204, 512]  # an expert
ATTENTION = [(8, 6, 256, 64), (2, 12, 1024, 64)]  # samples, heads, keys, width
QUERIES = [13, 26, 51, 128]  # a sample


def alternate(
    ways: list[Callable[..., Any]], given: list[tuple[Any, ...]], rounds: int
) -> list[float]:
    """Median milliseconds of each way over all of `given`, call by call in turn."""
    times: list[list[float]] = [[] for _ in ways]
    for turn in range(rounds + 1):
        for arguments in given:
            for way, spent in zip(ways, times, strict=True):
                start = time.perf_counter()
                way(*arguments)
                if turn:  # the first round warms up
                    spent.append(1000 * (time.perf_counter() - start))
    return [median(spent) for spent in times]


def row(label: dict[str, Any], gflop: float, torch_ms: float, kernel_ms: float) -> dict[str, Any]:
    return {
        **label,
        "torch, ms": torch_ms,
        "kernel, ms": kernel_ms,
        "torch, GFLOP/s": 1000 * gflop / torch_ms,
        "kernel, GFLOP/s": 1000 * gflop / kernel_ms,
        "kernel / torch": kernel_ms / torch_ms,
    }


def products(dtype: torch.dtype, rounds: int) -> Iterator[dict[str, Any]]:
    turned = (False, True) if dtype == torch.float32 and dtype in few_queries.dtypes() else (False,)
    for inputs, outputs, around in [(*widths, around) for around in turned for widths in WIDTHS]:
        shape = (EXPERTS, inputs, outputs) if around else (EXPERTS, outputs, inputs)
        sets = [torch.randn(shape).to(dtype) for _ in range(3)]
        sets = [(w.transpose(1, 2) if around else w).unbind() for w in sets]
        for count in ROWS:
            x = torch.randn(EXPERTS * count, inputs).to(dtype)
            out = torch.empty(len(x), outputs, dtype=dtype)
            ends = torch.arange(1, EXPERTS + 1) * count

            def by_torch(weights: list[Tensor], x: Tensor = x, out: Tensor = out) -> None:
                parts = zip(x.chunk(EXPERTS), weights, out.chunk(EXPERTS), strict=True)
                for part, weight, to in parts:
                    torch.mm(part, weight.t(), out=to)

            def by_kernel(
                weights: list[Tensor], x: Tensor = x, out: Tensor = out, ends: Tensor = ends
            ) -> None:
                assert few_rows.products(x, ends, weights, (), out), "more rows than it takes"

            if count > few_rows.MANY[native.capability(), dtype]:
                continue
            spent = alternate([by_torch, by_kernel], [(w,) for w in sets], rounds)
            gflop = 2 * len(x) * inputs * outputs / 1e9
            label = {
                "in x out": f"{inputs} x {outputs}",
                "stored": "[I, O]" if around else "[O, I]",
            }
            yield row({**label, "rows": count}, gflop, *spent)


def attentions(dtype: torch.dtype, rounds: int) -> Iterator[dict[str, Any]]:
    for batch, heads, keys, width in ATTENTION:
        for count in QUERIES:
            sizes = (count, keys, keys)
            q, k, v = (torch.randn(batch, n, heads, width).to(dtype).transpose(1, 2) for n in sizes)
            ways = [F.scaled_dot_product_attention, lambda *qkv: few_queries.attention(*qkv, None)]
            spent = alternate(ways, [(q, k, v)], 3 * rounds)
            gflop = 4 * q.numel() * keys / 1e9
            shape = f"{batch} x {heads} x {keys} x {width}"
            yield row({"keys": shape, "queries": count}, gflop, *spent)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="kernels for few rows against torch's")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    print(machine())
    for made, name, dtypes in (
        (products, "products", native.dtypes()),
        (attentions, "attention", few_queries.dtypes()),
    ):
        if dtype not in dtypes:
            print(f"{name}: no kernel for {arguments.dtype} on this machine, torch computes")
            continue
        rows = list(tqdm(made(dtype, arguments.rounds), desc=name, ncols=88))
        print(tabulate(rows, headers="keys", floatfmt=".3g"))


if __name__ == "__main__":
    main()
