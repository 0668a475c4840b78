"""How fast a reuse step is, and what the wrapper costs.

    python benchmarks/reuse_step.py [--depth 12] [--batch 8] [--budgets 0.05 0.1 0.2 0.3]
    ->  table: a refresh and a reuse step in ms, their ratio, mean step against plain Inductor and
        against one graph without caching, FLOPs, kept: / one graph over / FLOPs
        the line through reuse / refresh over the share computed
        out/benchmarks/reuse_step.json, raw milliseconds included

All engines share one set of weights and take turns call by call; a call's cost is its time over
that of plain Inductor's same call, so that a busy second of the machine meets both. Every figure is
a median. Plain Inductor runs the model as it is written, graph breaks included; `moeca interval 1`
is the same arithmetic in one graph. FLOPs are those that moeca counted while it ran.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import linear_regression, median
from typing import Any

import torch
from models import Call, inputs, overhead_model, speed_calls, speed_model
from output import save
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm, trange

import moeca_compile
from moeca_compile.runtime.registry import REGISTRY
from moeca_compile.speed.networks import with_shared_weights

INTERVAL = 4
CYCLES = 2  # refresh intervals in one timed generation


@dataclass
class Engine:
    """One way to run the model, and what was measured of it. refresh, reuse: costs of the steps, in
    units of plain Inductor's same step."""

    name: str
    run: Callable[..., Tensor]
    interval: int = 0  # 0: not moeca
    refresh_ms: list[float] = field(default_factory=list)
    reuse_ms: list[float] = field(default_factory=list)
    refresh: list[float] = field(default_factory=list)
    reuse: list[float] = field(default_factory=list)
    flops_full: float = 0.0
    flops_computed: float = 0.0

    @property
    def mean_cost(self) -> float:
        """Median costs, weighted as the interval mixes them."""
        if not self.reuse:
            return median(self.refresh)
        share = 1 / self.interval
        return share * median(self.refresh) + (1 - share) * median(self.reuse)

    def step(self, call: Call, plain_ms: float | None) -> float:
        """Run one call and note it as the kind of step it turned out to be; its milliseconds."""
        before = moeca_compile.stats(self.run) if self.interval else None
        elapsed_ms = timed(self.run, call)
        reused = False
        if before is not None:
            after = moeca_compile.stats(self.run)
            reused = after.reuse_steps > before.reuse_steps
            self.flops_full += after.flops_full - before.flops_full
            self.flops_computed += after.flops_computed - before.flops_computed
        (self.reuse_ms if reused else self.refresh_ms).append(elapsed_ms)
        (self.reuse if reused else self.refresh).append(elapsed_ms / (plain_ms or elapsed_ms))
        return elapsed_ms


def build(model: nn.Module, budgets: list[float], score: str, order: str) -> list[Engine]:
    def moeca(**options: Any) -> Callable[..., Tensor]:
        return torch.compile(with_shared_weights(model), backend="moeca", options=options)

    engines = [
        Engine("plain Inductor", torch.compile(with_shared_weights(model))),
        Engine("moeca interval 1", moeca(interval=1), 1),
    ]
    for budget in budgets:
        run = moeca(interval=INTERVAL, budget=budget, score=score, order=order)
        engines.append(Engine(f"moeca {100 * budget:g} %", run, INTERVAL))
    return engines


@torch.no_grad()
def warm_up(engine: Engine, calls: list[Call]) -> None:
    """One generation that compiles what there is to compile; not measured."""
    for call in calls:
        engine.run(*call)


@torch.no_grad()
def run_generation(engines: list[Engine], calls: list[Call]) -> None:
    """One generation of every engine, call by call; the first engine is what costs are relative to.

    The order of the others turns from call to call: none always runs behind the same one.
    """
    with contextlib.ExitStack() as generations:
        for engine in engines[1:]:
            generations.enter_context(moeca_compile.generation(engine.run))
        for number, call in enumerate(calls):
            plain_ms = engines[0].step(call, None)
            turn = 1 + number % max(1, len(engines) - 1)
            for engine in (*engines[turn:], *engines[1:turn]):
                engine.step(call, plain_ms)


def timed(run: Callable[..., Tensor], call: Call) -> float:
    start = time.perf_counter()
    run(*call)
    return 1000 * (time.perf_counter() - start)


def measure(engines: list[Engine], calls: list[Call], rounds: int) -> None:
    """Warm up every engine, then let them take turns."""
    for engine in tqdm(engines, desc="warm-up", ncols=88):
        warm_up(engine, calls)
    for _ in trange(rounds, desc="rounds", ncols=88):
        run_generation(engines, calls)


@torch.no_grad()
def wrapper_overhead_us(calls: int = 2000) -> dict[str, float]:
    """Median microseconds of a call of a tiny model: plain Inductor, moeca, and the difference.

    The two graphs are not quite the same, so the difference also holds what the rewrite costs.
    """
    model = overhead_model()
    call = inputs(model, batch=1)
    engines = {
        "plain": torch.compile(with_shared_weights(model)),
        "moeca": torch.compile(
            with_shared_weights(model), backend="moeca", options={"interval": 1}
        ),
    }
    for run in engines.values():
        for _ in range(20):
            run(*call)
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(calls):
        for name, run in engines.items():
            times[name].append(1000 * timed(run, call))
    medians = {f"{name}_us": median(values) for name, values in times.items()}
    return medians | {"overhead_us": medians["moeca_us"] - medians["plain_us"]}


@torch.no_grad()
def placing_us(calls: int = 400) -> float:
    """Median microseconds a cached call spends before its variant starts.

    Watching the weights, placing the call in its generation and lane, choosing the variant; the
    tiny model is called along a trajectory, so that every call is a reuse or a refresh.
    """
    model = with_shared_weights(overhead_model())
    compiled = torch.compile(model, backend="moeca", options={"interval": 4})
    x, t, y = inputs(model, batch=1)
    compiled(x, t, y)
    (entry,) = REGISTRY.entries_of(compiled)
    spent: list[float] = []

    def timed_place(tensors: list[Tensor]) -> Any:
        start = time.perf_counter()
        step = place(tensors)
        entry.controller.decide(step, 1)
        spent.append(1e6 * (time.perf_counter() - start))
        return step

    place, entry._place = entry._place, timed_place  # type: ignore[method-assign]
    for index in range(calls):
        compiled(x + 1e-3 * index, t - 1e-3 * index, y)
    return median(spent)


def cost_line(engines: list[Engine], budgets: list[float]) -> str:
    """Slope and intercept of a reuse step's cost over its budget, in units of a refresh step."""
    reusing = [e for e in engines if e.reuse]
    if len(reusing) < 2:
        return "one budget: no line"
    costs = [median(e.reuse) / median(e.refresh) for e in reusing]
    slope, intercept = linear_regression(budgets, costs)
    return f"reuse / refresh = {intercept:.3f} + {slope:.2f} x budget"


def figures(engine: Engine, one_graph: Engine) -> dict[str, Any]:
    """One row of the table and of the JSON file."""
    wall = one_graph.mean_cost / engine.mean_cost
    flops = engine.flops_full / engine.flops_computed if engine.flops_computed else 1.0
    return {
        "engine": engine.name,
        "refresh ms": median(engine.refresh_ms),
        "reuse ms": median(engine.reuse_ms) if engine.reuse_ms else None,
        "refresh / plain": median(engine.refresh),
        "refresh / reuse": median(engine.refresh) / median(engine.reuse) if engine.reuse else None,
        "/ plain": 1 / engine.mean_cost,
        "/ one graph": wall,
        "/ FLOPs": flops,
        "kept": wall / flops,
        "raw_refresh_ms": engine.refresh_ms,
        "raw_reuse_ms": engine.reuse_ms,
        "raw_refresh": engine.refresh,
        "raw_reuse": engine.reuse,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="speed of refresh and reuse steps")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="timed generations per engine")
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.05, 0.1, 0.2, 0.3])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--score", choices=["moeca", "input_drift"], default="input_drift")
    parser.add_argument(
        "--order", choices=["router_first", "attention_first"], default="router_first"
    )
    parser.add_argument("--threads", type=int, help="default: what torch takes")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    overhead = wrapper_overhead_us() | {"placing_us": placing_us()}
    model = speed_model(arguments.depth, dtype)
    engines = build(model, arguments.budgets, arguments.score, arguments.order)
    measure(engines, speed_calls(CYCLES * INTERVAL, arguments.batch, dtype), arguments.rounds)
    rows = [figures(engine, engines[1]) for engine in engines]
    shown = [{k: v for k, v in row.items() if not k.startswith("raw_")} for row in rows]
    print(tabulate(shown, headers="keys", floatfmt=".2f"))
    print(f"\n{cost_line(engines, arguments.budgets)}")
    print(
        f"\nwrapper: {overhead['overhead_us']:.0f} us a call beyond plain Inductor "
        f"({overhead['moeca_us']:.0f} against {overhead['plain_us']:.0f}) without caching; "
        f"placing a cached call takes {overhead['placing_us']:.0f} us more"
    )
    save("reuse_step", arguments, overhead=overhead, engines=rows)


if __name__ == "__main__":
    main()
