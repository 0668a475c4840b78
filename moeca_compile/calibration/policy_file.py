"""The file a calibration leaves: options, the model they hold for, and what was measured.

save(PolicyFile(...), "policy.json")
load("policy.json").options          {"policy": "auto", "tolerance": 0.05}
load("other.json")                   OptionsError: what is wrong with the file, what to do

JSON, so that it can be read, compared and kept beside the weights. The model is checked when it is
compiled (check.py), the form of the file when the options are read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeca_compile.calibration.fingerprint import Fingerprint
from moeca_compile.errors import OptionsError

FORMAT = "moeca-policy"
VERSION = 1
AGAIN = "run moeca_compile.calibrate again"


@dataclass(frozen=True)
class PolicyFile:
    """options: for `torch.compile`, without `policy_file`. made_with: versions by package.

    target: what was asked for; reached: on the held-out seed, within 5 %. measured: worst over the
    seeds searched with; held_out: on a seed the search did not see. trials: every trade-off seen.
    """

    options: dict[str, Any]
    model: Fingerprint
    target: dict[str, float]
    reached: bool
    made_with: dict[str, str] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    held_out: dict[str, Any] = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything by name, infinite figures as None: JSON has no infinity."""
        head = {"format": FORMAT, "version": VERSION}
        return _finite({**head, **dataclasses.asdict(self)})


def save(file: PolicyFile, path: str | os.PathLike[str]) -> Path:
    """Write `file`; a reader sees the old one or the new one, never half of it."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(target.name + ".part")
    draft.write_text(json.dumps(file.to_dict(), indent=1) + "\n")
    draft.replace(target)
    return target


def load(path: str | os.PathLike[str]) -> PolicyFile:
    """Read and check. Raises OptionsError for a missing, broken or foreign file."""
    where = Path(path)
    data = _read(where)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise _refused(where, f"expected format {FORMAT!r}, found {found!r}", AGAIN)
    if data.get("version") != VERSION:
        found = f"format version {data.get('version')!r}, this package reads {VERSION}"
        raise _refused(where, found, f"{AGAIN} with this version")
    known = {f.name for f in dataclasses.fields(PolicyFile)}
    missing = sorted(known - data.keys())
    if missing:
        raise _refused(where, f"without {', '.join(missing)}", AGAIN)
    parts = {name: data[name] for name in known}
    return PolicyFile(**{**parts, **_checked(where, parts)})


def _read(where: Path) -> Any:
    try:
        return json.loads(where.read_text())
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise _refused(where, reason, "give the path that calibrate(save=...) wrote") from error
    except ValueError as error:  # JSON and UTF-8 both
        raise _refused(where, f"no JSON: {error}", f"copy it again or {AGAIN}") from error


def _checked(where: Path, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Options and model with their types; the rest is for people to read."""
    options, model = parts["options"], parts["model"]
    if not isinstance(options, dict) or "policy_file" in options:
        raise _refused(where, "its options are no table of options", AGAIN)
    try:
        return {"model": Fingerprint(**model)}
    except TypeError as error:
        raise _refused(where, f"its model is no fingerprint: {error}", AGAIN) from error


def _refused(where: Path, what: str, what_to_do: str) -> OptionsError:
    return OptionsError(f"option policy_file: {where}: {what}; {what_to_do}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
