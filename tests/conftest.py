"""What every test starts from: nothing compiled, nothing remembered."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _forget_compiled() -> Iterator[None]:
    """Dynamo keeps compiled code per code object and gives up after eight of them."""
    yield
    torch._dynamo.reset()
