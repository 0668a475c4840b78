"""What capture did to a model, per dispatch: replaced by which mechanism, or refused and why."""

from __future__ import annotations

from dataclasses import dataclass

from tabulate import tabulate

METHOD = "method"
STATEMENTS = "statements"
NONE = "none"
BRANCHES = "branches"
CONTEXTS = "contexts"
FLAGS = "flags"


@dataclass(frozen=True)
class ModuleCapture:
    """The outcome for one module that dispatches rows to a bank of experts.

    mechanism: "method", "statements" or "none"; location: "file:line function" of the dispatch.
    Beside dispatches, with num_experts 0: "branches" (tests whether a selection is empty dropped),
    "contexts" (attention kernels chosen in the new way) and "flags" (Dynamo keeps values and sizes
    read on the host in the graph).
    """

    path: str
    num_experts: int
    mechanism: str
    accepted: bool
    reason: str
    location: str


@dataclass(frozen=True)
class CaptureReport:
    """The outcome for one root module; elapsed_ms covers the analysis and the installation.

    others: what else stood in the way of one graph, and whether it does no more.
    """

    modules: tuple[ModuleCapture, ...]
    elapsed_ms: float
    others: tuple[ModuleCapture, ...] = ()

    @property
    def installed(self) -> int:
        """How many dispatches were replaced."""
        return sum(module.accepted for module in self.modules)

    @property
    def changed(self) -> bool:
        """Whether anything about the model was changed."""
        return any(module.accepted for module in (*self.modules, *self.others))

    def __str__(self) -> str:
        counts = f"{self.installed} of {len(self.modules)} dispatches replaced"
        head = f"{counts} in {self.elapsed_ms:.0f} ms"
        rows = [
            (
                m.path or "(root)",
                m.num_experts or "",
                m.mechanism,
                "yes" if m.accepted else "no",
                m.reason,
                m.location,
            )
            for m in (*self.modules, *self.others)
        ]
        columns = ("module", "experts", "mechanism", "replaced", "reason", "location")
        return f"{head}\n{tabulate(rows, headers=columns)}" if rows else head
