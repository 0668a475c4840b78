"""Kernels of our own are used where they were measured, and torch computes everywhere else."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moeca_compile.lowering import native

moeca = torch.ops.moeca
AMD, INTEL = "AuthenticAMD", "GenuineIntel"
F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.usefixtures("fresh_kernels")
@pytest.mark.parametrize(
    ("variable", "capability", "processor", "expected"),
    [
        (None, "AVX2", (AMD, {"avx512_bf16"}), {F32}),
        (None, "AVX2", (INTEL, set()), {F32}),
        (None, "AVX512", (AMD, {"avx512_bf16"}), {F32, BF16}),
        (None, "AVX512", (AMD, {"avx512f"}), {F32}),
        (None, "AVX512", (INTEL, {"avx512_bf16"}), set()),
        (None, "DEFAULT", (AMD, set()), set()),
        ("0", "AVX2", (AMD, set()), set()),
    ],
)
def test_where_they_are_used(
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
    capability: str,
    processor: tuple[str, set[str]],
    expected: set[torch.dtype],
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(native, "_processor", lambda: processor)
    monkeypatch.setattr(sys, "platform", "linux")
    if variable:
        monkeypatch.setenv("MOECA_KERNEL", variable)
    assert native.dtypes() == expected
    assert native.capability() == (capability if expected else "")


@pytest.mark.usefixtures("fresh_kernels")
def test_on_other_systems_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not native.dtypes()


def test_a_processor_that_nothing_is_said_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """In some sandboxes there is no /proc."""
    monkeypatch.setattr(native, "CPUINFO", Path("/nowhere/cpuinfo"))
    assert native._processor() == ("", set())


@pytest.mark.usefixtures("fresh_kernels")
def test_without_a_compiler_torch_computes_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(source: str) -> Any:
        raise OSError("g++ not found\nand many lines more")

    monkeypatch.setattr(native, "c_library", no_compiler)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(sys, "platform", "linux")
    rows, weight = torch.randn(4, 16), torch.randn(8, 16)
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    with caplog.at_level(logging.WARNING, native.log.name):
        for _ in range(2):
            got = moeca.few_rows_linear(rows, weight, None)
            torch.testing.assert_close(got, rows @ weight.t())
            attended = moeca.few_queries_attention(q, k, v, None)
            torch.testing.assert_close(attended, F.scaled_dot_product_attention(q, k, v))
    (line,) = caplog.messages
    assert "no kernels, g++ not found" in line
