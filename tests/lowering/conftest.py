"""The kernels of our own, in every way that this processor can run them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moeca_compile.lowering import native


def kinds() -> list[tuple[str, torch.dtype]]:
    """What they are compiled for here, the way of older processors included."""
    older = [("AVX2", torch.float32)] if native.capability() == "AVX512" else []
    return [*older, *((native.capability(), dtype) for dtype in native.dtypes())]


def forget() -> None:
    """Decide, compile and look up anew."""
    for each in (native.capability, native.dtypes, native.kernel, native._tell):
        each.cache_clear()


@pytest.fixture(params=sorted(kinds(), key=str), ids=str)
def kernel_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    capability, dtype = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        forget()
        yield dtype
    forget()


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def fresh_kernels() -> Iterator[None]:
    """For tests that change what they are decided by."""
    forget()
    yield
    forget()
