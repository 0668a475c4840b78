"""What a figure depends on: processor, device, threads, versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

import moeca_compile

PEERS = ("diffusers", "cache-dit", "transformers", "triton")


def machine(device: str = "cpu") -> dict[str, Any]:
    """Names and numbers, JSON-serialisable. Call it with the threads that were measured with."""
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moeca_compile": moeca_compile.__version__,
        "packages": {name: v for name in PEERS if (v := _version(name)) is not None},
    }
    if torch.device(device).type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def describe(found: dict[str, Any]) -> str:
    """One line for the head of a table."""
    parts = [
        found.get("gpu") or found["cpu"],
        f"{found['threads']} threads",
        f"load {found['load']}",
        f"torch {found['torch']}",
        found["date"],
    ]
    return ", ".join(parts)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = info.read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
