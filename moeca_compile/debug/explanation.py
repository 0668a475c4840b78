"""The report of `explain`, as a table, as JSON and as Markdown.

str(report)            report.to_dict()            report.to_markdown()
kind  module  ...      {"regions": [...], ...}     | kind | module | ... |
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from ..capture import CaptureReport
from .predict import Prediction

HEADERS = ("kind", "module", "matched", "what or why not", "where")


@dataclass(frozen=True)
class ExplainedRegion:
    """kind: "moe" or "attention"; name: module path; reason: why it is not matched, or matched
    and still not cached; else empty.

    num_experts, top_k: of a MoE layer, else None; no top_k where experts choose. location:
    file:line in the user's code. stage: the last stage that looked at it; node: what it stopped
    at, in that stage's graph.
    """

    kind: str
    name: str
    matched: bool
    reason: str = ""
    detail: str = ""
    location: str = ""
    num_experts: int | None = None
    top_k: int | None = None
    stage: str = ""
    node: str = ""

    @property
    def what(self) -> str:
        """What it is, or why it did not match and at which stage."""
        if self.matched:
            return f"{self.detail}; not cached: {self.reason}" if self.reason else self.detail
        return f"{self.reason} [{self.stage}]"

    @property
    def where(self) -> str:
        """The user's line, or the graph's node where the trace has no line."""
        return self.location or (f"node {self.node}" if self.node else "")


@dataclass(frozen=True)
class Explanation:
    """cache_bytes: per lane, for these inputs. graph_breaks: graphs Dynamo makes, minus one.

    break_reasons: one per break, with the user's line. prediction: None if nothing is cached.
    """

    regions: tuple[ExplainedRegion, ...]
    graph_breaks: int
    cache_bytes: int
    capture: CaptureReport | None
    notes: tuple[str, ...] = ()
    break_reasons: tuple[str, ...] = ()
    prediction: Prediction | None = None

    @property
    def matched(self) -> bool:
        """Whether there is a layer to cache, and nothing that looks like one was refused."""
        layers = [r for r in self.regions if r.kind == "moe"]
        return bool(layers) and all(r.matched for r in layers)

    def to_dict(self) -> dict[str, Any]:
        """All of it by name, JSON-serialisable."""
        return {
            "regions": [{**asdict(r), "where": r.where} for r in self.regions],
            "graph_breaks": self.graph_breaks,
            "break_reasons": list(self.break_reasons),
            "cache_bytes": self.cache_bytes,
            "capture": asdict(self.capture) if self.capture else None,
            "prediction": self.prediction.to_dict() if self.prediction else None,
            "notes": list(self.notes),
        }

    def to_markdown(self) -> str:
        """A table and a list, for an issue or a pull request."""
        rows = [[str(cell).replace("|", "\\|") for cell in row] for row in self._rows()]
        table = tabulate(rows, headers=HEADERS, tablefmt="github") if rows else "No regions."
        return "\n".join([table, "", *(f"- {line}" for line in self._lines())])

    def __str__(self) -> str:
        widths = [None, 40, None, 60, 60]
        table = tabulate(self._rows(), headers=HEADERS, tablefmt="simple", maxcolwidths=widths)
        return "\n".join([table if self.regions else "no regions", *self._lines()])

    def _rows(self) -> list[tuple[str, str, str, str, str]]:
        return [
            (r.kind, r.name, "yes" if r.matched else "no", r.what, r.where) for r in self.regions
        ]

    def _lines(self) -> list[str]:
        lines = [f"graph breaks {self.graph_breaks}, cache {self.cache_bytes:,} bytes per lane"]
        lines += [f"graph break: {reason}" for reason in self.break_reasons]
        return [*lines, *([str(self.prediction)] if self.prediction else []), *self.notes]
