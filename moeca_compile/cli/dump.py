"""`moeca dump MODEL --out DIR`: every stage of the compile as files, no kernel compiled.

moeca dump model.py:build --out dump -o budget=0.1
python dump/000_graph/reproducer/replay.py      # the same compile, without the model's code
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from ..debug.dump import Dumper
from ..debug.explain import Analyser, explain_with
from ..debug.replay import possible_variants
from ..lowering.variants import Variants
from ..options import Options
from ..pipeline import Analysis
from .common import (
    Stages,
    emit,
    found_a_problem,
    json_flag,
    model_argument,
    option_values,
    progress,
)
from .load import load_subject


class _DumpingAnalyser(Analyser):
    """Dumps every variant of every graph that has a layer to cache."""

    def __init__(self, options: Options, out: Path, weights: bool, stages: Stages) -> None:
        super().__init__(options, lambda: Dumper.below(out, "graph", weights))
        self._stages = stages

    def analysed(self, analysis: Analysis, dumper: Dumper) -> None:
        super().analysed(analysis, dumper)
        variants = Variants(analysis, self.options, {}, dumper)
        for name in possible_variants(analysis):
            self._stages.enter(name)
            with torch.no_grad():
                variants.lowered(name)


@click.command()
@model_argument
@option_values
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("dump"),
    show_default=True, help="Folder for the dumps; new numbered folders are made in it.",
)  # fmt: skip
@click.option("--weights", is_flag=True, help="Keep weights and inputs in the reproducer.")
@json_flag
def command(model: str, options: dict[str, Any], out: Path, weights: bool, as_json: bool) -> None:
    """Every stage of the compile as numbered files, and a reproducer; no kernel is compiled."""
    before = set(out.iterdir()) if out.is_dir() else set()
    with progress("loading") as stages:
        subject = load_subject(model)
        stages.enter("analysing")
        chosen = Options.parse({**subject.options, **options})
        analyser = _DumpingAnalyser(chosen, out, weights, stages)
        report = explain_with(analyser, subject.model, subject.args, subject.kwargs)
    files = sorted(
        str(path)
        for folder in set(out.iterdir()) - before
        for path in folder.rglob("*")
        if path.is_file()
    )
    text = "\n".join(files)
    emit(text, {"files": files, "graphs": analyser.graphs, "notes": analyser.notes}, as_json)
    if not report.matched:
        found_a_problem()
