"""The most memory a process held, and held since a moment: of the device, or resident."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """begin() forgets what was held before, where the system can (Linux, CUDA)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def begin(self) -> None:
        """From here on."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif CLEAR.exists():
            CLEAR.write_text("5")  # resets the high-water mark of resident memory

    def read(self) -> tuple[int, int]:
        """(since `begin`, ever) in bytes."""
        if self._device.type == "cuda":
            held = torch.cuda.max_memory_allocated(self._device)
            return held, held
        unit = 1 if sys.platform == "darwin" else 1024
        ever = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
        return (int(found[1]) * 1024 if found else ever), ever
