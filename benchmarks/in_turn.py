"""Full steps and reuse steps in one process, call by call in turn: differences of some percent.

    python benchmarks/in_turn.py small [--depth 4] [--batch 8] [--calls 40] [--budget 0.1]
    python benchmarks/in_turn.py benchmarks/thirdparty.py:joint_eighth
    ->  table: processor ms of a call as shipped (plain Inductor), in one graph without caching, of
        a refresh and of a reuse step; over one graph's; out/benchmarks/in_turn.json

`moeca bench` runs its candidates as processes that take turns generation by generation, which is
what users get and good to some percent. Here every call of one stands next to one of the others: a
ratio is the median over such pairs. A refresh is the first step of a generation whose caches are
there already, a reuse step its second.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch
from output import save
from tabulate import tabulate
from tqdm import tqdm, trange

import moeca_compile
from moeca_compile.speed.networks import with_shared_weights
from moeca_compile.speed.workload import Call, Sizes, load

ONE_GRAPH = "one graph"


def processor_ms(run: Callable[..., Any], call: Call) -> float:
    start = time.process_time()
    run(*call[0], **call[1])
    return 1000 * (time.process_time() - start)


@torch.no_grad()
def measure(spec: str, sizes: Sizes, budget: float, calls: int) -> dict[str, list[float]]:
    """Processor ms of every call, by row of the table."""
    workload = load(spec, sizes)
    first, second = workload.calls[:2]

    def compiled(**settings: Any) -> Callable[..., Any]:
        return torch.compile(with_shared_weights(workload.model), **settings)

    options = {"interval": 4, "budget": budget, "order": "attention_first"}
    alone = {
        "as shipped": compiled(),
        ONE_GRAPH: compiled(backend="moeca", options={"interval": 1}),
    }
    cached = compiled(backend="moeca", options=options)
    found: dict[str, list[float]] = {name: [] for name in (*alone, "refresh", "reuse")}

    def plain(name: str) -> None:
        found[name].append(processor_ms(alone[name], first))

    def generation() -> None:
        with moeca_compile.generation(cached):
            found["refresh"].append(processor_ms(cached, first))
            found["reuse"].append(processor_ms(cached, second))

    turns = [lambda name=name: plain(name) for name in alone] + [generation]
    for turn in tqdm(turns, desc="compile", ncols=88):
        turn()  # the first call of a captured model is not compiled
        turn()
    stats = moeca_compile.stats(cached)
    if not stats.reuse_steps:
        raise SystemExit(f"no step of {spec} was a reuse step: {stats}")
    for times in found.values():
        times.clear()
    for number in trange(calls, desc="calls", ncols=88):
        at = number % len(turns)
        for turn in (*turns[at:], *turns[:at]):  # none always runs behind the same one
            turn()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="steps in turn, call by call")
    parser.add_argument("model", help="a configuration of `moeca bench`, or FILE.py:factory")
    parser.add_argument("--depth", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--calls", type=int, default=40)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = Sizes(batch=arguments.batch, steps=2, depth=arguments.depth)
    found = measure(arguments.model, sizes, arguments.budget, arguments.calls)
    rows = [
        {
            "": name,
            "median ms": median(times),
            "lower quartile ms": quantiles(times)[0],
            "/ one graph": median(t / base for t, base in zip(times, found[ONE_GRAPH])),
        }
        for name, times in found.items()
    ]
    print(tabulate(rows, headers="keys", floatfmt=("", ".1f", ".1f", ".3f")))
    save("in_turn", arguments, rows=rows, raw=found)


if __name__ == "__main__":
    main()
