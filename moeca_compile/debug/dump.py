"""Numbered text dumps of the graph after every stage, and a table of the stages.

    dump_dir/000_graph/  00_dynamo.txt  01_aten.txt  02_normalize_experts.txt  ..
                         05_match_regions.txt  06_refresh.dialect.txt  07_refresh.lowered.txt  ..
                         summary.txt
Each node is shown with dtype, shape, module path and source line. Off: no file, no work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate
from torch.fx import GraphModule


@dataclass
class Dumper:
    """Writes stages of one compiled graph into `folder`; does nothing when it is None."""

    folder: Path | None
    _rows: list[tuple[str, int, float, str]] = field(default_factory=list)

    @classmethod
    def below(cls, root: Path | None, name: str) -> Dumper:
        """A dumper with a new numbered folder below `root`. Raises OSError if it cannot be made."""
        if root is None:
            return cls(None)
        root.mkdir(parents=True, exist_ok=True)
        number = sum(1 for p in root.iterdir() if p.is_dir())
        folder = root / f"{number:03d}_{name}"
        folder.mkdir()
        return cls(folder)

    def graph(self, stage: str, gm: GraphModule, elapsed_ms: float = 0.0, note: str = "") -> None:
        """Dump one graph and add its line to the summary."""
        if self.folder is None:
            return
        text = gm.print_readable(print_output=False)
        self.text(stage, text)
        self._rows.append((stage, len(gm.graph.nodes), elapsed_ms, note))
        table = tabulate(
            self._rows, headers=("stage", "nodes", "ms", "note"), floatfmt=".1f", tablefmt="simple"
        )
        (self.folder / "summary.txt").write_text(table + "\n")

    def text(self, stage: str, text: str) -> None:
        """Write any text as the next numbered file."""
        if self.folder is None:
            return
        number = sum(1 for p in self.folder.iterdir() if p.name[:2].isdigit())
        (self.folder / f"{number:02d}_{stage}.txt").write_text(text + "\n")
