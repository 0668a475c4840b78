"""Trains an example model on Fashion-MNIST: AdamW, warm-up and cosine decay, EMA weights.

    python -m examples.training.train finegrained --steps 4500 --out out/training
    ->  out/training/finegrained/config.json, weights.safetensors (EMA, fp16), state.pt, log.txt

A run that was cut goes on from its last checkpoint with --resume.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .data import DATA_FOLDER, load_split
from .models import MODELS, Entry
from .sorted_dispatch import use_sorted_dispatch

LOG_EVERY, CHECKPOINT_EVERY = 50, 100


@dataclass
class Run:
    """Everything a checkpoint holds."""

    model: nn.Module
    ema: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    step: int = 0
    seconds: float = 0.0


def progress(run: Run, arguments: argparse.Namespace) -> float:
    """0 at the start, 1 at the last step or when the time is up, whichever comes first."""
    return max(run.step / arguments.steps, run.seconds / (60 * arguments.minutes))


def learning_rate(run: Run, arguments: argparse.Namespace) -> float:
    """Linear warm-up times half a cosine that reaches zero at the end."""
    warm = min(1.0, (run.step + 1) / arguments.warmup)
    return arguments.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress(run, arguments))))


def train_step(
    run: Run, entry: Entry, layers: list[nn.Module], images: Tensor, labels: Tensor
) -> float:
    """One update on a batch; its weighted squared error."""
    config = run.model.cfg
    dropped = torch.rand(len(labels), generator=run.generator) < config.label_dropout
    labels = labels.masked_fill(dropped, config.num_classes)
    task = entry.objective(images, run.generator)
    loss = task.loss(run.model(task.noisy, task.t, labels))
    run.optimizer.zero_grad()
    (loss + entry.balance_loss(layers)).backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    entry.after_step(layers)
    return loss.item()


@torch.no_grad()
def update_ema(run: Run, decay: float) -> None:
    """Moving average of all weights and buffers; early steps count less long."""
    decay = min(decay, (1 + run.step) / (10 + run.step))
    for name, value in run.model.state_dict().items():
        run.ema[name].lerp_(value, 1 - decay)


def save(run: Run, folder: Path) -> None:
    """EMA weights as the examples ship them, and the state to go on from."""
    half = {name: value.half().contiguous() for name, value in run.ema.items()}
    save_file(half, folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps(asdict(run.model.cfg), indent=1) + "\n")
    state = {
        "model": run.model.state_dict(),
        "ema": run.ema,
        "optimizer": run.optimizer.state_dict(),
        "generator": run.generator.get_state(),
        "step": run.step,
        "seconds": run.seconds,
    }
    torch.save(state, folder / "state.pt.part")
    (folder / "state.pt.part").rename(folder / "state.pt")


def load(run: Run, folder: Path) -> None:
    state = torch.load(folder / "state.pt")
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.generator.set_state(state["generator"])
    run.ema, run.step, run.seconds = state["ema"], state["step"], state["seconds"]


def start(entry: Entry, arguments: argparse.Namespace) -> Run:
    torch.manual_seed(arguments.seed)
    model = entry.make().train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, 0.99), fused=True)
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return Run(model, ema, optimizer, torch.Generator().manual_seed(arguments.seed))


def fit(run: Run, entry: Entry, arguments: argparse.Namespace, folder: Path) -> None:
    images, labels = load_split(arguments.data, "train")
    layers = use_sorted_dispatch(run.model, entry.moe_class)
    losses: list[float] = []
    mark = time.perf_counter() - run.seconds
    bar = tqdm(initial=run.step, total=arguments.steps, ncols=88, mininterval=30)
    while progress(run, arguments) < 1:
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(run, arguments)
        pick = torch.randint(len(images), (arguments.batch,), generator=run.generator)
        losses.append(train_step(run, entry, layers, images[pick], labels[pick]))
        run.step += 1
        update_ema(run, arguments.ema)
        run.seconds = time.perf_counter() - mark
        bar.update()
        if run.step % LOG_EVERY == 0:
            report(run, losses, layers, folder)
            losses.clear()
        if run.step % CHECKPOINT_EVERY == 0:
            save(run, folder)
    save(run, folder)


def report(run: Run, losses: list[float], layers: list[nn.Module], folder: Path) -> None:
    """One line of the log: mean loss, and the busiest expert's tokens over the mean."""
    busiest = max(float(layer.load.max() / layer.load.float().mean()) for layer in layers)
    mean = sum(losses) / len(losses)
    line = f"step {run.step} seconds {run.seconds:.0f} loss {mean:.5f} busiest {busiest:.2f}\n"
    with (folder / "log.txt").open("a") as log:
        log.write(line)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="train an example model on Fashion-MNIST")
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--data", type=Path, default=DATA_FOLDER)
    parser.add_argument("--out", type=Path, default=Path("out/training"))
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--minutes", type=float, default=40, help="end earlier on a slow machine")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    folder = arguments.out / arguments.model
    folder.mkdir(parents=True, exist_ok=True)
    entry = MODELS[arguments.model]
    run = start(entry, arguments)
    if arguments.resume:
        load(run, folder)
    fit(run, entry, arguments, folder)


if __name__ == "__main__":
    main()
