"""What starting costs: processor seconds until both variants have run, cold and warm.

    python benchmarks/start_up.py [--depth 12] [--rounds 3]
    ->  table: plain Inductor and moeca (refresh and reuse, 10 %, attention first) with empty kernel
        caches and with those of the process before, over plain Inductor's, and warm over cold
        out/benchmarks/start_up.json, every process's calls included

Every figure is a median over processes of their own that take turns. Processor time, of compilers
started too, with one compile thread; imports are not counted. The steps themselves are taken off:
what the same calls cost once all is compiled, and for the call that captures two eager ones.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from models import speed_calls, speed_model
from output import save
from tabulate import tabulate
from tqdm import tqdm

import moeca_compile  # noqa: F401  the backend, and its import before the clock starts

OPTIONS = {"interval": 4, "budget": 0.1, "order": "attention_first"}
CALLS = {"plain": 3, "moeca": 6}  # moeca: captures, refresh, reuse; then reuse, reuse, refresh
BATCH = 8


def processor_seconds() -> float:
    """Of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def timed(run: Callable[..., Any], call: Any) -> float:
    start = processor_seconds()
    run(*call)
    return processor_seconds() - start


@torch.no_grad()
def work(name: str, depth: int) -> dict[str, Any]:
    """Seconds of an eager call, and of each call of the compiled model, in this process."""
    torch.set_num_threads(1)
    model = speed_model(depth, torch.float32)
    calls = speed_calls(CALLS[name], BATCH, torch.float32)
    model(*calls[0])
    eager = timed(model, calls[0])
    settings: dict[str, Any] = {"backend": "moeca", "options": OPTIONS} if name == "moeca" else {}
    compiled = torch.compile(model, **settings)
    return {"name": name, "eager": eager, "calls": [timed(compiled, call) for call in calls]}


def start_seconds(found: dict[str, Any]) -> float:
    """What starting cost, without the steps themselves."""
    calls = found["calls"]
    if found["name"] == "plain":
        return calls[0] - min(calls[1:])
    reuse, refresh = min(calls[3:5]), calls[5]
    return sum(calls[:3]) - 2 * found["eager"] - refresh - reuse


def process(name: str, depth: int, cache: Path) -> dict[str, Any]:
    """`work` in a process of its own, with the kernels in `cache`."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    command = [sys.executable, __file__, "--worker", name, "--depth", str(depth)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="processor seconds of a cold and a warm start")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", choices=list(CALLS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(arguments.worker, arguments.depth)))
        return
    found: dict[str, list[dict[str, Any]]] = {
        f"{n} {s}": [] for s in ("cold", "warm") for n in CALLS
    }
    with tqdm(total=4 * arguments.rounds, ncols=88) as progress:
        for _ in range(arguments.rounds):
            with tempfile.TemporaryDirectory() as folder:
                for start in ("cold", "warm"):
                    for name in CALLS:
                        progress.set_description(f"{name} {start}")
                        cache = Path(folder) / name
                        found[f"{name} {start}"].append(process(name, arguments.depth, cache))
                        progress.update()
    seconds = {name: median(map(start_seconds, each)) for name, each in found.items()}
    rows = [
        {
            "": name,
            "cold s": seconds[f"{name} cold"],
            "/ plain": seconds[f"{name} cold"] / seconds["plain cold"],
            "warm s": seconds[f"{name} warm"],
            "warm / cold": seconds[f"{name} warm"] / seconds[f"{name} cold"],
            "cold, each": " ".join(f"{start_seconds(f):.0f}" for f in found[f"{name} cold"]),
            "warm, each": " ".join(f"{start_seconds(f):.0f}" for f in found[f"{name} warm"]),
        }
        for name in CALLS
    ]
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    save("start_up", arguments, rows=rows, raw=found)


if __name__ == "__main__":
    main()
