"""What a graph is compiled for: the options as given, the model, and what capture made of it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .capture import Phase, RootRegistry, RootState
from .capture.recapture import Recapture
from .options import Options
from .runtime.registry import REGISTRY, Settings

ROOTS = RootRegistry()
RECAPTURE = Recapture(ROOTS, calls_of=REGISTRY.calls_of, on_lift=REGISTRY.release)


@dataclass(frozen=True)
class Request:
    """What one backend call is to compile for. config: Inductor's; settings: as the user gave them.

    The model is held weakly: compiled code outlives models and must keep none alive.
    """

    options: Options
    config: dict[str, Any] = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)
    owner: weakref.ref[nn.Module] | None = None

    @property
    def root(self) -> nn.Module | None:
        return self.owner() if self.owner is not None else None


def refused_state(root: nn.Module | None) -> RootState | None:
    """The state of a model whose dispatch could not be captured; None while or if it could."""
    state = ROOTS.find(root) if root is not None else None
    return state if state is not None and state.phase is Phase.REFUSED else None


def state_with_refusals(root: nn.Module | None) -> RootState | None:
    """The state of a model that comes as one graph although a dispatch could not be replaced."""
    state = ROOTS.find(root) if root is not None else None
    if state is None or state.phase is not Phase.CAPTURED or state.report is None:
        return None
    return state if any(not m.accepted for m in state.report.modules) else None
