"""Numbered dumps of the graph after every stage, what each changed, and a table of the stages.

    dump_dir/000_graph/  00_dynamo.txt  01_aten.txt  02_normalize_experts.txt  + .diff  ..
                         05_match_regions.txt  06_refresh.dialect.txt  07_refresh.lowered.txt  ..
                         layers/00_blocks.0.moe.dot  .svg      reproducer/      summary.txt
Each node is shown with dtype, shape, module path, source line and role. Off: no file, no work.
Every stage also goes to torch's structured trace (TORCH_TRACE, tlparse) and to the debug log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch.fx import GraphModule, Node

from ..graph.region import NoMatch, Regions
from ..options import Options
from ..torch_compat import trace_artifact
from .graph_diff import graph_diff
from .graph_dot import layer_dot, write_svg
from .graph_text import graph_text
from .marks import Mark, miss_marks, region_marks, variant_marks
from .reproducer import NotSerialisable, write_reproducer

log = logging.getLogger("moeca_compile")
HEADERS = ("stage", "nodes", "ms", "note")


@dataclass
class Dumper:
    """Writes stages of one compiled graph into `folder`; does nothing when it is None.

    weights: whether the reproducer keeps the values of parameters and inputs.
    """

    folder: Path | None
    weights: bool = False
    _rows: list[tuple[str, int, float, str]] = field(default_factory=list)
    _texts: dict[str, str] = field(default_factory=dict)
    _number: int = 0

    @classmethod
    def below(cls, root: Path | None, name: str, weights: bool = False) -> Dumper:
        """A dumper with a new numbered folder below `root`. Raises OSError if it cannot be made."""
        if root is None:
            return cls(None)
        root.mkdir(parents=True, exist_ok=True)
        number = sum(1 for p in root.iterdir() if p.is_dir())
        folder = root / f"{number:03d}_{name}"
        folder.mkdir()
        return cls(folder, weights)

    def graph(self, stage: str, gm: GraphModule, elapsed_ms: float = 0.0, note: str = "") -> None:
        """Dump one graph and what it changed, and add its line to the summary."""
        log.debug("%s: %d nodes, %.1f ms %s", stage, len(gm.graph.nodes), elapsed_ms, note)
        text = _once(lambda: graph_text(gm, _words(variant_marks(gm))))
        trace_artifact(f"moeca_{stage}", text)
        if self.folder is None:
            return
        before = self._before(stage)
        self._texts[stage] = text()
        path = self._write(stage, text())
        if before:
            diff = graph_diff(self._texts[before], text(), (before, stage))
            path.with_suffix(".diff").write_text(diff)
        self._rows.append((stage, len(gm.graph.nodes), elapsed_ms, note))
        table = tabulate(self._rows, headers=HEADERS, floatfmt=".1f", tablefmt="simple")
        (self.folder / "summary.txt").write_text(table + "\n")

    def text(self, stage: str, text: str) -> None:
        """Write any text as the next numbered file."""
        trace_artifact(f"moeca_{stage}", lambda: text)
        if self.folder is not None:
            self._write(stage, text)

    def regions(
        self, gm: GraphModule, table: Callable[[], str], regions: Regions, missed: Sequence[NoMatch]
    ) -> None:
        """The table of regions, the graph with every node's role, and a drawing of each layer."""

        def text() -> str:
            marks = miss_marks(missed) | region_marks(regions)
            return f"{table()}\n\n{graph_text(gm, _words(marks))}"

        log.debug("match_regions: %d matched, %d refused", len(regions.moe), len(missed))
        trace_artifact("moeca_match_regions", text)
        if self.folder is None:
            return
        self._write("match_regions", text())
        self._draw_layers(regions, self.folder / "layers")

    def _draw_layers(self, regions: Regions, folder: Path) -> None:
        folder.mkdir()
        marks = region_marks(regions)
        for number, moe in enumerate(regions.moe):
            path = folder / f"{number:02d}_{moe.name}.dot"
            path.write_text(layer_dot(moe.name, marks))
            problem = write_svg(path)
            if problem:
                log.info("no SVG of %s: %s", path.name, problem)

    def reproducer(self, gm: GraphModule, values: Sequence[Any], options: Options) -> None:
        """A folder that replays this compile without the user's code; says so if it cannot."""
        if self.folder is None:
            return
        try:
            write_reproducer(self.folder / "reproducer", gm, values, options, self.weights)
        except NotSerialisable as error:
            (self.folder / "no_reproducer.txt").write_text(f"{error}\n")

    def _write(self, stage: str, text: str) -> Path:
        assert self.folder is not None, "asked only while dumping"
        path = self.folder / f"{self._number:02d}_{stage}.txt"
        self._number += 1
        path.write_text(text + "\n")
        return path

    def _before(self, stage: str) -> str:
        """The stage this one is compared with: the last of its own variant, or of all variants."""
        variant, _, part = stage.partition(".")
        if part == "lowered":
            return f"{variant}.dialect"
        common = [name for name in self._texts if "." not in name]
        return common[-1] if common else ""


def _words(marks: Mapping[Node, Mark]) -> dict[Node, str]:
    return {node: str(mark) for node, mark in marks.items()}


def _once(make: Callable[[], str]) -> Callable[[], str]:
    """`make`, called when the text is first needed and not again."""
    made: list[str] = []

    def text() -> str:
        if not made:
            made.append(make())
        return made[0]

    return text
