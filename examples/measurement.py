"""What the demo and the benchmarks measure with: image distance, accuracy, the machine."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

import torch
from fashion_ditmoe.classifier import load_classifier, run
from torch import Tensor

MODEL = Path(__file__).parent / "fashion_ditmoe"


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pixels; images span [-1, 1], so the peak is 2."""
    error = (a - b).double().square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(4.0 / error)


def accuracy(images: Tensor, labels: Tensor) -> float:
    """Share of `images [B, 1, 32, 32]` that a classifier takes for `labels [B]`."""
    _, predicted = run(load_classifier(MODEL / "classifier.safetensors"), images)
    return (predicted == labels).double().mean().item()


def machine() -> dict[str, object]:
    """What a figure depends on: processor, threads, versions."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = info.read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
