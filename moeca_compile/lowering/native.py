"""Kernels of our own for a CPU, in C++ beside this file: where they are used, how they are built.

    vectors.cpp + few_rows.cpp or few_queries.cpp   libraries, which g++ compiles at first use

float32 with AVX2 or AVX-512, bfloat16 with AVX512_BF16, each where it was measured to be faster
than torch (docs/speed.md has the figures); nothing elsewhere. MOECA_KERNEL=0 in the environment
leaves all of it to torch, to look for what makes a difference.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..torch_compat import c_library

log = logging.getLogger(__name__)

CPUINFO = Path("/proc/cpuinfo")
POINTER, NUMBER = ctypes.c_void_p, ctypes.c_int64  # in signatures of kernels


@cache
def capability() -> str:
    """What the kernels are compiled for: AVX2, AVX512, or nothing where none is used.

    With AVX-512 on AMD's processors only: MKL keeps to AVX2 there, others were not measured.
    """
    if os.environ.get("MOECA_KERNEL") == "0" or sys.platform != "linux":
        return ""
    name = torch.backends.cpu.get_cpu_capability()
    if name == "AVX512":
        return name if _processor()[0] == "AuthenticAMD" else ""
    return name if name == "AVX2" else ""


@cache
def dtypes() -> frozenset[torch.dtype]:
    """Of the values the kernels are for, on this machine."""
    if capability() == "AVX512" and "avx512_bf16" in _processor()[1]:
        return frozenset({torch.float32, torch.bfloat16})
    return frozenset({torch.float32} if capability() else ())


def _processor() -> tuple[str, set[str]]:
    """Vendor and features of the first processor, as Linux names them; nothing if it does not."""
    if not CPUINFO.exists():
        return "", set()
    lines = CPUINFO.read_text().split("\n\n")[0].splitlines()
    values = {key.strip(): value.strip() for key, _, value in (li.partition(":") for li in lines)}
    return values.get("vendor_id", ""), set(values.get("flags", "").split())


@cache
def kernel(
    name: str, dtype: torch.dtype, signature: tuple[Any, ...], *forms: str
) -> Callable[..., None] | None:
    """The C function `name` of the file of that name, compiled for values of `dtype`; None, and one
    line in the log, if it does not compile. signature: types of its arguments for ctypes. forms:
    what else is defined, each MOECA_..."""
    wanted = (capability(), str(dtype).removeprefix("torch."), *forms)
    defines = [f"#define MOECA_{each.upper()}" for each in wanted]
    texts = [Path(__file__).with_name(file).read_text() for file in ("vectors.cpp", f"{name}.cpp")]
    try:
        function = getattr(c_library("\n".join([*defines, *texts])), name)
    except Exception as error:  # whatever a compiler, or a folder, may be missing
        _tell(str(error).strip().splitlines()[0])
        return None
    function.argtypes, function.restype = signature, None
    return function  # type: ignore[no-any-return]


@cache
def _tell(reason: str) -> None:
    log.warning("few rows are computed by torch, slower: no kernels, %s", reason)
