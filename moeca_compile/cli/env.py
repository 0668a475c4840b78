"""`moeca env`: what a bug report needs about this machine and installation.

moeca env  ->  moeca_compile 0.1.0   torch 2.13.0+cpu   python 3.12   c++ g++ ...
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from typing import Any

import click
import torch
from tabulate import tabulate

import moeca_compile

from ..lowering import native
from .common import emit, json_flag

PACKAGES = ("torch", "sympy", "tabulate", "click", "tqdm", "jinja2", "matplotlib", "diffusers")
TOOLS = ("c++", "g++", "clang++", "dot")
VARIABLES = (
    *("MOECA_DUMP_DIR", "MOECA_KERNEL", "TORCH_LOGS", "TORCH_TRACE"),
    *("OMP_NUM_THREADS", "CXX"),
)


def environment() -> dict[str, Any]:
    """Versions, devices and tools by name; None for what is not there."""
    return {
        "moeca_compile": moeca_compile.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "kernels of our own": _kernels(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "tools": {name: shutil.which(name) is not None for name in TOOLS},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _kernels() -> str | None:
    dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in native.dtypes())
    return f"{native.capability()}: {', '.join(dtypes)}" if dtypes else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _rows(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _rows(value, f"{prefix}{name} ")
        else:
            rows.append((prefix + name, "-" if value is None else value))
    return rows


@click.command()
@json_flag
def command(as_json: bool) -> None:
    """Versions and devices, for a bug report."""
    found = environment()
    emit(tabulate(_rows(found), tablefmt="plain", disable_numparse=True), found, as_json)
