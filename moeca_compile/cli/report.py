"""`moeca report MODEL --out run.html`: sample once with the backend, write the run report.

moeca report model.py:Sampler -o budget=0.1 --out run.html
->  run.html, run.computed.png, run.unmatched.png, run.drift.png
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

import moeca_compile

from ..errors import MoecaError
from .common import emit, found_a_problem, json_flag, model_argument, option_values, progress
from .load import Subject, load_subject

SHOWN = 8


@click.command()
@model_argument
@option_values
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("run.html"),
    show_default=True, help="The page; the plots are put beside it.",
)  # fmt: skip
@click.option("--no-plots", is_flag=True, help="No PNG files beside the page.")
@json_flag
def command(model: str, options: dict[str, Any], out: Path, no_plots: bool, as_json: bool) -> None:
    """Sample once with the backend and write what every step did as one HTML page.

    MODEL's factory returns an object with .model and .generate(). Exit code 1 if no step read from
    the cache.
    """
    with progress("loading", unit="step") as stages:
        subject = load_subject(model)
        compiled = torch.compile(
            subject.model, backend="moeca", options={**subject.options, **options}
        )
        result = _sample(subject, compiled, stages.step)
        try:
            images = _images(result)
            moeca_compile.report(compiled, out, images=images, plots=not no_plots)
        except MoecaError as error:
            raise click.UsageError(str(error)) from error
    stats = moeca_compile.stats(compiled)
    plots = [] if no_plots else sorted(str(p) for p in out.parent.glob(f"{out.stem}.*.png"))
    data = {"report": str(out), "plots": plots, "stats": stats.to_dict()}
    emit("\n".join([str(out), *plots, "", str(stats)]), data, as_json)
    if not stats.reuse_steps + stats.forecast_steps + stats.skip_steps:
        found_a_problem()


def _sample(subject: Subject, compiled: Callable[..., Any], step: Callable[[], None]) -> Any:
    """One recorded generation. The first call captures the dispatch: ahead, so that it counts."""
    moeca_compile.prepare(subject.model, *subject.args, **subject.kwargs)
    with moeca_compile.record(compiled):
        return subject.generate(_Counting(compiled, step))


class _Counting:
    """The compiled model, and a tick of the progress bar a call."""

    def __init__(self, compiled: Callable[..., Any], step: Callable[[], None]) -> None:
        self._compiled = compiled
        self._step = step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._step()
        return self._compiled(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)


def _images(result: Any) -> dict[str, Tensor]:
    """The first images of what `generate()` returned, in [0, 1]; none if it returned no images."""
    if not isinstance(result, Tensor) or result.dim() != 4 or result.shape[1] not in (1, 3):
        return {}
    low = -1.0 if result.min() < 0 else 0.0
    return {"generated": ((result[:SHOWN] - low) / (1 - low)).clamp(0, 1)}
