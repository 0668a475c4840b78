"""How far the images move for how much arithmetic, on the trained demo model.

    python benchmarks/quality.py --interval 2 4 --score input_drift moeca --budget 0.1 0.2
    ->  table sorted by FLOPs ratio: policy, FLOPs ratio, PSNR to the full run, accuracy
        out/benchmarks/quality.json

Every combination of the listed options is sampled with the same noise and compared with the
uncached eager run of 50 steps. The honest baseline is in the table too: fewer steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from typing import Any

import torch
from models import MODEL, ROOT, accuracy, load_model, machine, psnr, sample
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import moeca_compile

OUT = ROOT / "out" / "benchmarks"


def policies(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All option sets asked for; impossible combinations are left out."""
    rules = [{"tau": tau} for tau in arguments.tau]
    rules += [{"budget": budget} for budget in arguments.budget]
    combinations = itertools.product(arguments.interval, arguments.score, arguments.order, rules)
    return [
        {"interval": interval, "score": score, "order": order} | rule
        for interval, score, order, rule in combinations
        if order == "router_first" or "budget" in rule
    ]


def generate(
    model: Callable[..., Tensor], labels: Tensor, steps: int, arguments: argparse.Namespace
) -> Tensor:
    return sample(model, labels, steps, arguments.cfg_scale, arguments.seed)


def run_policy(
    options: dict[str, Any], labels: Tensor, arguments: argparse.Namespace
) -> tuple[Tensor, Any]:
    """Images of one policy and the statistics of its single generation."""
    torch._dynamo.reset()  # one policy after another: nothing compiled is needed again
    compiled = torch.compile(load_model(MODEL), backend="moeca", options=options)
    return generate(compiled, labels, arguments.steps, arguments), moeca_compile.stats(compiled)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    labels = torch.arange(arguments.samples) % 10
    eager = load_model(MODEL)
    full = generate(eager, labels, arguments.steps, arguments)
    rows = [_row(f"full, {arguments.steps} steps", 1.0, full, full, labels)]
    for steps in arguments.fewer_steps:
        images = generate(eager, labels, steps, arguments)
        rows.append(_row(f"{steps} steps", arguments.steps / steps, images, full, labels))
    for options in tqdm(policies(arguments), desc="policies", ncols=88):
        images, stats = run_policy(options, labels, arguments)
        name = " ".join(f"{key}={value}" for key, value in options.items())
        row = _row(name, stats.flops_full / stats.flops_computed, images, full, labels)
        row["branches"] = stats.branches_computed / stats.branches_total
        row["tokens"] = stats.tokens_attended / stats.tokens_total
        rows.append(row | {"options": options})
    return sorted(rows, key=lambda row: row["flops_ratio"])


def _row(
    name: str, flops_ratio: float, images: Tensor, full: Tensor, labels: Tensor
) -> dict[str, Any]:
    same = images is full
    return {
        "policy": name,
        "flops_ratio": flops_ratio,
        "psnr_db": None if same else psnr(images, full),
        "accuracy": accuracy(images, labels),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="image quality against arithmetic")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cfg-scale", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--interval", type=int, nargs="+", default=[4])
    parser.add_argument("--score", nargs="+", default=["moeca", "input_drift"])
    parser.add_argument("--order", nargs="+", default=["router_first"])
    parser.add_argument("--tau", type=float, nargs="*", default=[0.8])
    parser.add_argument("--budget", type=float, nargs="*", default=[0.1, 0.2])
    parser.add_argument("--fewer-steps", type=int, nargs="*", default=[25, 17, 12])
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    rows = measure(arguments)
    shown = [{k: v for k, v in row.items() if k != "options"} for row in rows]
    print(tabulate(shown, headers="keys", floatfmt=".3f"))
    OUT.mkdir(parents=True, exist_ok=True)
    result = {"arguments": vars(arguments), "machine": machine(), "policies": rows}
    (OUT / "quality.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {OUT / 'quality.json'}")


if __name__ == "__main__":
    main()
