"""Sample the same images from a trained model: eager, plain Inductor, and this backend twice.

    auto     as it comes: whole steps are forecast
    moeca    the paper's rule: rows are reused

    python examples/demo.py        (or `make demo`)
    ->  a table on the terminal
        out/demo/samples.png       eager, Inductor, auto, moeca, |eager - auto|, |eager - moeca|
        out/demo/summary.json      the figures of the table
        out/demo/details.json      raw seconds, options, machine

Every engine first makes one whole generation to warm up, which is not timed; then the engines take
turns, so that a slow minute of the machine meets all of them. Seconds are medians of those runs.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from fashion_ditmoe.model import DiTMoE, load_model
from fashion_ditmoe.sampler import sample
from measurement import MODEL, accuracy, machine, psnr
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import moeca_compile

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OPTIONS: dict[str, dict[str, Any]] = {"auto": {}, "moeca": {"interval": 4, "budget": 0.1}}
STEPS = 50
CFG_SCALE = 1.5
IMAGES_PER_CLASS = 2
ROUNDS = 3
SEED = 0

OUT = Path(__file__).parents[1] / "out" / "demo"
LABELS = torch.arange(10).repeat(IMAGES_PER_CLASS)
ENGINES = ("eager", "inductor", *OPTIONS)


@dataclass
class Runs:
    """What one engine did: the images of its last run, seconds of every timed run."""

    images: Tensor = field(default_factory=lambda: torch.empty(0))
    seconds: list[float] = field(default_factory=list)
    compilations: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def load() -> DiTMoE:
    """A fresh copy of the model, so that no engine sees what another did to its own."""
    return load_model(MODEL)


def build(engine: str) -> Callable[..., Tensor]:
    if engine == "eager":
        return load()
    if engine == "inductor":
        return torch.compile(load())
    return torch.compile(load(), backend="moeca", options=OPTIONS[engine])


def compilations() -> int:
    """Graphs handed to a backend so far, recompilations included."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def generate(name: str, model: Callable[..., Tensor]) -> tuple[Tensor, float]:
    """One generation with a progress bar: images [B, 1, 32, 32], seconds."""
    with tqdm(total=STEPS, desc=f"{name:<20}", unit="step", ncols=88) as bar:
        start = time.perf_counter()
        images = sample(model, LABELS, STEPS, CFG_SCALE, SEED, on_step=lambda *_: bar.update(1))
        return images, time.perf_counter() - start


def measure(models: dict[str, Callable[..., Tensor]]) -> dict[str, Runs]:
    """Warm up every engine, then let them take turns."""
    for name, model in models.items():
        generate(f"warm-up {name}", model)
    runs = {name: Runs() for name in models}
    for index in range(ROUNDS):
        for name, model in models.items():
            before = compilations()
            images, seconds = generate(f"round {index + 1} {name}", model)
            runs[name].images = images
            runs[name].seconds.append(seconds)
            runs[name].compilations += compilations() - before
    return runs


def summarise(
    runs: dict[str, Runs], models: dict[str, Callable[..., Tensor]], graph_breaks: int
) -> dict[str, float]:
    """The figures of out/demo/summary.json."""
    eager, inductor = runs["eager"], runs["inductor"]
    found: dict[str, float] = {
        "seconds_eager": eager.median,
        "seconds_inductor": inductor.median,
        "accuracy_full": accuracy(eager.images, LABELS),
        "graph_breaks": graph_breaks,
    }
    for name in OPTIONS:
        stats, run = moeca_compile.stats(models[name]), runs[name]
        end = "" if name == "moeca" else f"_{name}"
        found |= {
            f"seconds_{name}": run.median,
            f"speedup_wall{end}": inductor.median / run.median,
            f"speedup_flops{end}": stats.speedup_flops,
            f"psnr_db{end}": psnr(eager.images, run.images),
            f"accuracy_{name}": accuracy(run.images, LABELS),
            f"recompiles_after_warmup{end}": run.compilations,
            f"cache_bytes{end}": stats.cache_bytes,
        }
    return found


def print_tables(runs: dict[str, Runs], summary: dict[str, float]) -> None:
    reference = runs["eager"].images
    flops = {"auto": summary["speedup_flops_auto"], "moeca": summary["speedup_flops"]}
    rows = []
    for name in ENGINES:
        seconds = runs[name].median
        rows.append(
            [
                name,
                seconds,
                1000 * seconds / STEPS,
                runs["inductor"].median / seconds,
                flops.get(name, 1.0),
                accuracy(runs[name].images, LABELS),
                psnr(reference, runs[name].images),
            ]
        )
    headers = [
        "", "seconds", "ms a step", "speed-up", "in FLOPs", "accuracy", "PSNR to eager, dB",
    ]  # fmt: skip
    print(f"\n{len(LABELS)} images, {STEPS} steps, guidance {CFG_SCALE}, median of {ROUNDS} runs;")
    print("speed-up is over plain Inductor on the model as it is; auto is the default policy,")
    print(f"moeca the paper's rule with {OPTIONS['moeca']}\n")
    print(tabulate(rows, headers, floatfmt=("", ".2f", ".1f", ".2f", ".2f", ".3f", ".1f")))
    print()
    print(tabulate([(k, round(v, 4)) for k, v in summary.items()], ("summary.json", "")))


def draw(runs: dict[str, Runs], path: Path) -> None:
    """One image per class and engine, and the absolute differences of the cached ones to eager."""
    rows = [(name, runs[name].images, -1.0, 1.0) for name in ENGINES]
    for name in OPTIONS:
        difference = (runs["eager"].images - runs[name].images).abs()
        rows.append((f"|eager - {name}|\nwhite: 0.5 of 2", difference, 0.0, 0.5))
    figure, axes = plt.subplots(len(rows), 10, figsize=(11, 1.15 * len(rows)))
    for line, (name, images, low, high) in zip(axes, rows):
        for axis, image in zip(line, images):
            axis.imshow(image[0], cmap="gray", vmin=low, vmax=high)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    torch.manual_seed(SEED)
    OUT.mkdir(parents=True, exist_ok=True)
    example = (torch.randn(2, 1, 32, 32), torch.full((2,), 0.5), torch.tensor([0, 10]))
    report = moeca_compile.explain(load(), *example)
    print(report)
    models = {name: build(name) for name in ENGINES}
    runs = measure(models)
    summary = summarise(runs, models, report.graph_breaks)
    print_tables(runs, summary)
    for name in OPTIONS:
        print(f"\n{name}: {moeca_compile.stats(models[name])}")
    draw(runs, OUT / "samples.png")
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    details = {
        "options": OPTIONS,
        "steps": STEPS,
        "cfg_scale": CFG_SCALE,
        "images": len(LABELS),
        "seed": SEED,
        "seconds": {name: runs[name].seconds for name in ENGINES},
        **machine(),
    }
    (OUT / "details.json").write_text(json.dumps(details, indent=2) + "\n")
    print(f"\nwrote {OUT}/samples.png, summary.json, details.json")


if __name__ == "__main__":
    main()
