"""The run report: one HTML file that needs nothing else, and plots as PNG beside it.

    with moeca_compile.record(compiled):
        images = sampler(compiled, labels)
    moeca_compile.report(compiled, "run.html", images={"moeca": images})
    ->  run.html   run.computed.png   run.unmatched.png   run.drift.png

Without a recording the page has the totals only, and says so.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MoecaError
from ..runtime.registry import REGISTRY
from ..runtime.stats import merge_stats
from .report_data import MAPS, report_data
from .report_plots import draw_maps

NEEDED = ("jinja2", "matplotlib")
MAX_IMAGES = 32
Image = Tensor | str | Path


def report(
    compiled: nn.Module | Callable[..., Any],
    path: str | Path,
    *,
    images: Mapping[str, Image] | None = None,
    plots: bool = True,
) -> Path:
    """Write the report of everything since the last reset to `path`; returns the path.

    images: by caption, a PNG or JPEG file or a tensor [C, H, W] or [B, C, H, W], values in [0, 1],
    C 1 or 3. plots: also the heat maps as PNG beside it. Raises MoecaError without the packages of
    the extra `report`, ValueError for an image of another shape, TypeError as `stats`.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        needs = " and ".join(missing)
        raise MoecaError(f'report needs {needs}: pip install "moeca-compile[report]"')
    entries = REGISTRY.entries_of(compiled)
    data = report_data(entries, merge_stats([entry.stats() for entry in entries]))
    data["images"] = [s for name, image in (images or {}).items() for s in _sources(name, image)]
    data["maps"] = list(MAPS)
    data["versions"] = {"torch": torch.__version__}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(_page(data), encoding="utf-8")
    if plots:
        draw_maps(data["entries"], target.with_suffix(""))
    return target


def _page(data: dict[str, Any]) -> str:
    import jinja2

    source = resources.files("moeca_compile.debug").joinpath("report.html.jinja").read_text("utf-8")
    template = jinja2.Environment(autoescape=True).from_string(source)
    # "</script>" in a module path must not end the script element
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return template.render(data=text, made=made, torch_version=torch.__version__)


def _sources(caption: str, image: Image) -> list[dict[str, str]]:
    """One `data:` address per image of a batch."""
    if not isinstance(image, Tensor):
        kind = "jpeg" if str(image).lower().endswith(("jpg", "jpeg")) else "png"
        return [_source(caption, Path(image).read_bytes(), kind)]
    batch = image.detach().float().cpu()
    batch = batch.unsqueeze(0) if batch.dim() == 3 else batch
    if batch.dim() != 4 or batch.shape[1] not in (1, 3):
        shape = tuple(image.shape)
        raise ValueError(
            f"image {caption!r}: expected [C, H, W] or [B, C, H, W] with C 1 or 3, got {shape}"
        )
    return [_source(caption, _png(each), "png") for each in batch[:MAX_IMAGES]]


def _source(caption: str, content: bytes, kind: str) -> dict[str, str]:
    text = base64.b64encode(content).decode()
    return {"caption": caption, "src": f"data:image/{kind};base64,{text}"}


def _png(image: Tensor) -> bytes:
    from matplotlib.image import imsave

    pixels = image.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
    held = io.BytesIO()
    imsave(held, pixels, format="png")
    return held.getvalue()
