"""What capture did to a model, per dispatch: replaced by which mechanism, or refused and why."""

from __future__ import annotations

from dataclasses import dataclass

from tabulate import tabulate

METHOD = "method"
STATEMENTS = "statements"
NONE = "none"


@dataclass(frozen=True)
class ModuleCapture:
    """The outcome for one module that dispatches rows to a bank of experts.

    mechanism: "method", "statements" or "none"; location: "file:line function" of the dispatch.
    """

    path: str
    num_experts: int
    mechanism: str
    accepted: bool
    reason: str
    location: str


@dataclass(frozen=True)
class CaptureReport:
    """The outcome for one root module; elapsed_ms covers the analysis and the installation."""

    modules: tuple[ModuleCapture, ...]
    elapsed_ms: float

    @property
    def installed(self) -> int:
        """How many dispatches were replaced."""
        return sum(module.accepted for module in self.modules)

    def __str__(self) -> str:
        counts = f"{self.installed} of {len(self.modules)} dispatches replaced"
        head = f"{counts} in {self.elapsed_ms:.0f} ms"
        rows = [
            (
                m.path or "(root)",
                m.num_experts,
                m.mechanism,
                "yes" if m.accepted else "no",
                m.reason,
                m.location,
            )
            for m in self.modules
        ]
        columns = ("module", "experts", "mechanism", "replaced", "reason", "location")
        return f"{head}\n{tabulate(rows, headers=columns)}" if rows else head
