"""A page as a real browser sees it, offline: its DOM after scripts ran, and what it complained of.

page = open_page(path, width=1280)
page.dom.count('class="cell"'), page.console
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--virtual-time-budget=5000",
)  # fmt: skip


@dataclass(frozen=True)
class Page:
    """dom: serialised after loading; console: messages of the page itself."""

    dom: str
    console: tuple[str, ...]


def open_page(path: Path, width: int) -> Page:
    """Load `path` in headless Chromium; skips the test with a reason where there is none."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    with TemporaryDirectory() as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},2400"]
        done = subprocess.run(
            [*command, "--dump-dom", path.resolve().as_uri()],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Page(done.stdout, tuple(re.findall(r"CONSOLE[^\n]*", done.stderr)))
