"""What a step costs on a GPU, and whether it keeps its promises there; run by benchmarks/gpu.sh.

    eager | torch.compile | one graph, no caching | moeca | auto | the same with CUDA graphs
    ->  benchmarks/results/gpu-DATE-NAME.json and one table

Checked before anything is timed: every candidate's full step equals eager's within bf16 rounding,
and no graph of a whole generation waits for the device (`set_sync_debug_mode("error")` while a
variant runs). A candidate that fails keeps its row, with what went wrong. Candidates take turns;
times are medians between device synchronisations.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_checks import no_waiting
from tabulate import tabulate

import moeca_compile
from moeca_compile.backend import moeca  # by object: a checkout may not be installed
from moeca_compile.errors import MoecaError
from moeca_compile.runtime.registry import REGISTRY
from moeca_compile.speed.machine import describe, machine
from moeca_compile.speed.networks import SIZES, build, call, with_shared_weights
from moeca_compile.speed.workload import Call, trajectory
from moeca_compile.torch_compat import without_kernels

RESULTS = Path(__file__).parent / "results"
BUDGETED = {"policy": "moeca", "interval": 4, "budget": 0.1, "order": "attention_first"}
UNCACHED = "one graph"
OURS = {UNCACHED: {"interval": 1}, "moeca, 10 %": BUDGETED, "auto": {"policy": "auto"}}
TOLERANCE = {"bfloat16": 4e-2, "float32": 1e-3}  # TF32 where it is on; a few roundings of 2^-8
FAILED, CANNOT_RUN = 1, 2


@dataclass
class Candidate:
    """One way to run the model. problems: what a check found."""

    name: str
    run: Callable[..., Any]
    cached: bool = False
    first_s: float = 0.0
    error: float = 0.0
    peak_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    failed: bool = False
    steps_ms: dict[str, list[float]] = field(default_factory=dict)
    generations_ms: list[float] = field(default_factory=list)


def candidates(
    model: torch.nn.Module, device: torch.device, kernels: bool = True
) -> list[Candidate]:
    """Baselines, and this backend with and without CUDA graphs."""

    def ours(options: dict[str, Any]) -> Any:
        return torch.compile(with_shared_weights(model), backend=moeca, options=options)

    plain = torch.compile(with_shared_weights(model)) if kernels else model
    made = [Candidate("eager", model), Candidate("Inductor, as shipped", plain)]
    for name, options in OURS.items():
        made.append(Candidate(name, ours(options), True))
    if device.type == "cuda":
        for name, options in OURS.items():
            replayed = options | {"mode": "reduce-overhead"}
            made.append(Candidate(f"{name}, CUDA graphs", ours(replayed), True))
    return made


def check(candidate: Candidate, calls: list[Call], eager: torch.Tensor, limit: float) -> None:
    """`_check`; what goes wrong is a problem of this candidate alone."""
    try:
        _check(candidate, calls, eager, limit)
    except Exception as error:
        traceback.print_exc()
        told = (str(error).splitlines() or [""])[0]
        candidate.problems.append(f"failed: {type(error).__name__}: {told[:100]}")
        candidate.failed = True


@torch.no_grad()
def _check(candidate: Candidate, calls: list[Call], eager: torch.Tensor, limit: float) -> None:
    """Compile, compare a full step with eager, and let no graph wait for the device."""
    device = eager.device
    started = time.perf_counter()
    _generation(candidate, calls, device)  # its very first call is eager: it is looked at
    candidate.first_s = time.perf_counter() - started
    first = _generation(candidate, calls, device)
    candidate.error = float((first.float() - eager.float()).norm() / eager.float().norm())
    if not candidate.error <= limit:
        candidate.problems.append(f"first step {candidate.error:.1e} off, allowed {limit:.0e}")
    if candidate.cached and not REGISTRY.entries_of(candidate.run):
        candidate.problems.append("plain Inductor ran: nothing is cached")
    if candidate.cached and device.type == "cuda":
        try:
            with no_waiting(candidate.run):
                _generation(candidate, calls, device)
        except RuntimeError as error:
            candidate.problems.append(f"a step waits for the device: {str(error).splitlines()[0]}")
    candidate.steps_ms.clear()
    candidate.generations_ms.clear()


@torch.no_grad()
def _generation(candidate: Candidate, calls: list[Call], device: torch.device) -> torch.Tensor:
    """All calls once, timed; the output of the first."""
    kept = None
    begun = time.perf_counter()
    for args, kwargs in calls:
        before = _steps(candidate)
        _wait(device)
        started = time.perf_counter()
        out = candidate.run(*args, **kwargs)
        _wait(device)
        elapsed = 1e3 * (time.perf_counter() - started)
        kind = next((k for k, n in _steps(candidate).items() if n > before.get(k, 0)), "full")
        candidate.steps_ms.setdefault(kind, []).append(elapsed)
        kept = out.clone() if kept is None else kept  # CUDA graphs reuse their outputs' memory
    candidate.generations_ms.append(1e3 * (time.perf_counter() - begun))
    assert kept is not None
    return kept


def _steps(candidate: Candidate) -> dict[str, int]:
    if not candidate.cached:
        return {}
    stats = moeca_compile.stats(candidate.run)
    kinds = ("refresh", "reuse", "plain", "skip", "forecast")
    return {k: getattr(stats, f"{k}_steps") for k in kinds}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(made: list[Candidate], calls: list[Call], device: torch.device, rounds: int) -> None:
    """Turns, generation by generation."""
    for number in range(rounds):
        for candidate in made:
            print(f"round {number + 1}: {candidate.name}", file=sys.stderr)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            _generation(candidate, calls, device)
            if device.type == "cuda":
                candidate.peak_bytes = torch.cuda.max_memory_allocated(device)


def _full_steps(candidate: Candidate) -> list[float]:
    return [t for k in ("full", "refresh", "plain") for t in candidate.steps_ms.get(k, [])]


def rows(made: list[Candidate]) -> list[dict[str, Any]]:
    """One line per candidate; speed-ups over the fastest full step that any of them makes, a
    refresh included."""
    full_ms = {c.name: median(t) for c in made if (t := _full_steps(c))}
    base = min(full_ms.values())
    found = []
    for c in made:
        if not c.generations_ms:
            found.append({"candidate": c.name, "checks": "; ".join(c.problems)})
            continue
        stats = moeca_compile.stats(c.run) if c.cached else None
        cached = [t for k in ("reuse", "skip", "forecast") for t in c.steps_ms.get(k, [])]
        ours = median(c.generations_ms) / (
            sum(map(len, c.steps_ms.values())) / len(c.generations_ms)
        )
        flops = stats.speedup_flops if stats is not None else 1.0
        found.append(
            {
                "candidate": c.name,
                "ms / step": ours,
                "full step": full_ms.get(c.name),
                "cached step": median(cached) if cached else None,
                "/ fastest full": base / ours,
                "/ FLOPs": flops,
                "kept": base / ours / flops,
                "first generation s": c.first_s,
                "peak MiB": c.peak_bytes / 2**20 or None,
                "cache MiB": stats.cache_bytes / 2**20 if stats is not None else None,
                "off eager": c.error,
                "checks": "; ".join(c.problems) or "ok",
            }
        )
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="speed and promises on a GPU")
    parser.add_argument("--model", default="small", choices=list(SIZES))
    parser.add_argument("--depth", type=int, help="blocks, instead of the configuration's")
    parser.add_argument("--only", metavar="REGEX", help="candidates whose name has it, and eager")
    parser.add_argument("--profile", type=Path, help="a file for the kernels of cached steps")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=list(TOLERANCE))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--engine", default="inductor", choices=["inductor", "graph"], help="graph: no kernels"
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            f"no CUDA device: torch {torch.__version__} sees none on this machine. A dry run: "
            "benchmarks/gpu.sh --device cpu --model tiny --steps 6 --rounds 1",
            file=sys.stderr,
        )
        return CANNOT_RUN
    size, dtype = SIZES[arguments.model], getattr(torch, arguments.dtype)
    if arguments.depth is not None:
        size = replace(size, depth=arguments.depth)
    model = build(size, device=device).to(dtype)
    x, t, y = (v.to(device) for v in call(size, arguments.batch))
    first = x.to(dtype), t, y
    calls = trajectory((first, {}), first[0], t, arguments.steps)
    with torch.no_grad():
        eager = model(*first)
    with nullcontext() if arguments.engine == "inductor" else without_kernels():
        made = candidates(model, device, arguments.engine == "inductor")
        if arguments.only is not None:
            made = [c for c in made if c.name == "eager" or re.search(arguments.only, c.name)]
        for candidate in made:
            print(f"compile and check: {candidate.name}", file=sys.stderr)
            check(candidate, calls, eager, TOLERANCE[arguments.dtype])
            print(f"  {candidate.first_s:.1f} s {candidate.problems or 'ok'}", file=sys.stderr)
        working = [c for c in made if not c.failed]
        measure(working, calls, device, arguments.rounds)
        if arguments.profile is not None:
            arguments.profile.write_text("\n".join(profiled(c, calls) for c in working))
    return report(made, arguments)


@torch.no_grad()
def profiled(candidate: Candidate, calls: list[Call]) -> str:
    """Kernels of one full step and of the two steps after it, by time."""
    begin, last = (calls[:1], calls[1:3]) if candidate.cached else ([], calls[:1])
    told = []
    for name, part in (("first step", begin), ("next steps", last)):
        with torch.profiler.profile() as profile:
            for args, kwargs in part:
                candidate.run(*args, **kwargs)
            _wait(calls[0][0][0].device)
        key = "device_time_total" if torch.cuda.is_available() else "cpu_time_total"
        table = profile.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=80)
        told.append(f"== {candidate.name}, {name}: {len(part)}\n{table}")
    return "\n".join(told)


def report(made: list[Candidate], arguments: argparse.Namespace) -> int:
    """Table on stdout, JSON beside the other results."""
    where, found = machine(arguments.device), rows(made)
    given = {k: v for k, v in vars(arguments).items() if k not in ("out", "profile")}
    name = re.sub(r"\W+", "-", str(where.get("gpu") or "cpu")).strip("-").lower()
    date = datetime.date.today().isoformat()
    path = arguments.out / f"gpu-{date}-{name}-{arguments.model}.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    raw = {c.name: {"steps_ms": c.steps_ms, "generations_ms": c.generations_ms} for c in made}
    data = {"machine": where, "arguments": given, "rows": found, "raw": raw}
    path.write_text(json.dumps(data, indent=2) + "\n")
    print(describe(where))
    print(", ".join(f"{k} {v}" for k, v in given.items()))
    print(tabulate(found, headers="keys", floatfmt=".3g", missingval="-"))
    print(f"wrote {path}")
    return FAILED if any(c.problems for c in made) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MoecaError as error:
        print(error, file=sys.stderr)
        sys.exit(CANNOT_RUN)
