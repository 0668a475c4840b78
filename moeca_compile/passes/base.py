"""What a pass is: a frozen dataclass with a name and `run(graph) -> PassReport`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch.fx import GraphModule

from ..graph.region import NoMatch


@dataclass(frozen=True)
class PassReport:
    """`changed`: places rewritten; `missed`: what looked like a place but was refused, and why."""

    name: str
    changed: int
    missed: tuple[NoMatch, ...] = ()


class Pass(Protocol):
    """Edits the graph in place; lints and recompiles once if it changed anything."""

    @property
    def name(self) -> str: ...

    def run(self, gm: GraphModule) -> PassReport: ...
