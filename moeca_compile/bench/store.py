"""Rows on disk: one line per finished generation, so that a run that was cut off can go on.

store = RowStore(out / "rows.jsonl", resume=True)
key = row_key(subject=..., sampler=..., seed=0, candidate=..., ...)
store.find(key) or store.append({"key": key, ...})
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

import moeca_compile

Row = dict[str, Any]


def row_key(**identity: Any) -> str:
    """16 hex digits of everything a figure depends on, versions of package and torch included."""
    known = {**identity, "versions": versions()}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """What a row's key holds besides the setting."""
    return {"moeca_compile": moeca_compile.__version__, "torch": torch.__version__}


@cache
def sources_digest() -> str:
    """12 hex digits of the package's own source: rows of edited code are told apart by it.

    Not part of a key: whoever edits the package decides which rows to measure again.
    """
    folder = Path(moeca_compile.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class RowStore:
    """Finished rows by key, in a file that is only ever appended to.

    Without `resume` an earlier file is set aside as `<name>.previous`. Failed rows (with "error")
    are kept in the file but measured again.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not resume:
            path.replace(path.with_name(f"{path.name}.previous"))
        self._rows = {row["key"]: row for row in self._read()}

    @property
    def stale(self) -> int:
        """How many rows were measured with other sources of the package than those running."""
        return sum(row.get("sources") != sources_digest() for row in self._rows.values())

    def find(self, key: str) -> Row | None:
        """The finished row, None if there is none or it failed."""
        row = self._rows.get(key)
        return None if row is None or row.get("error") else row

    def append(self, row: Row) -> Row:
        """Write a row to disk, at once; returns it."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._rows[row["key"]] = row
        return row

    def _read(self) -> list[Row]:
        """Every whole line; a last one that was cut off is removed, so that the next is whole."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        return [json.loads(line) for line in whole.splitlines()]
