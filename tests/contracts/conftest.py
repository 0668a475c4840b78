"""Modes the contract tests run the real backend in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import moeca_compile.backend as backend_module
import moeca_compile.uncached as uncached_module
from graph_runs import use_graph_level


@pytest.fixture(scope="module")
def graph_level() -> Iterator[None]:
    """Variants run as lowered graphs, for as long as the module's fixtures live."""
    with pytest.MonkeyPatch.context() as patch:
        use_graph_level(patch)
        yield


@pytest.fixture(scope="module")
def plain_graphs(graph_level: None) -> Iterator[list[str]]:
    """What is not cached runs Dynamo's graph instead of Inductor; one entry per such graph."""
    made: list[str] = []

    def at_once(gm: Any, inputs: list[Any], config: dict[str, Any]) -> Callable[..., Any]:
        made.append("in the backend call")
        return gm.forward

    def later(gm: Any, request: Any) -> Callable[..., Any]:
        made.append("later")
        return gm.forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uncached_module, "inductor_fallback", at_once)
        for module in (backend_module, uncached_module):
            patch.setattr(module, "inductor_later", later)
        yield made
