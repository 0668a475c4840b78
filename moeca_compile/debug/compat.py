"""One row of the compatibility table: what plain torch.compile and this backend make of a model.

row = compare("my model", model, [((), {"x": x, "t": t})])
print(table([row]))
model     graphs, plain    graphs, moeca    regions    error      reuse    why not
my model             20                1        8/8    1.1e-07        3
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from ..api import generation, stats
from ..backend import moeca
from ..capture import prepare
from ..torch_compat import leaves
from .explain import explain
from .explanation import Explanation

Call = tuple[tuple[Any, ...], dict[str, Any]]
STEPS = 4
BUILD = "building it: "
_STAGES = (BUILD, "count_plain: ", "explain: ", "max_error: ", "reuse: ")
HEADERS = (
    "model", "idiom", "version", "graphs, plain", "graphs, moeca", "regions", "error", "reuse",
    "why not",
)  # fmt: skip


@dataclass(frozen=True)
class CompatRow:
    """What `compare` found; a number is None where the stage that gives it raised.

    graphs_plain, graphs_moeca: graphs Dynamo compiled for the first two calls, for moeca with the
    dispatch captured beforehand. regions_present: matched ones and near misses. max_error: largest
    ||compiled - eager|| / ||eager|| over the calls with interval=1. reuse_steps: with interval=4,
    of policy "moeca" unless another is asked for.
    reason: the first thing that went wrong; empty if nothing did. idiom: how the dispatch is
    written; version: where the model is from.
    """

    name: str
    graphs_plain: int | None
    graphs_moeca: int | None
    regions_matched: int
    regions_present: int
    max_error: float | None
    reuse_steps: int
    reason: str
    idiom: str = ""
    version: str = ""

    @property
    def absent(self) -> bool:
        """Whether the model could not be built here, so that nothing was run."""
        ran = (self.graphs_plain, self.graphs_moeca, self.max_error)
        return all(number is None for number in ran) and not self.failed

    @property
    def failed(self) -> bool:
        """Whether something raised."""
        return self.reason.startswith(_STAGES)

    @property
    def good(self) -> bool:
        """One graph, every region matched, and rows reused."""
        found = 0 < self.regions_matched == self.regions_present
        return self.graphs_moeca == 1 and found and self.reuse_steps > 0 and not self.reason

    def to_dict(self) -> dict[str, Any]:
        """All of it by name, JSON-serialisable."""
        return {**asdict(self), "good": self.good}


def compare(
    name: str,
    model: nn.Module,
    calls: Sequence[Call],
    *,
    expected_regions: int = 0,
    options: dict[str, Any] | None = None,
    count_plain: bool = True,
    idiom: str = "",
    version: str = "",
) -> CompatRow:
    """Run `model` eagerly, with plain torch.compile and with this backend.

    calls: arguments of successive calls of one generation, or of one call, which is then repeated.
    expected_regions: how many the model has, if more than what shows in the graph. options: of the
    backend. count_plain: whether to trace it without this package too. idiom, version: for the
    row.

    Forgets everything Dynamo has compiled in this process. Nothing a model or a compiler raises
    comes through: it is the row's reason.
    """
    run = _Comparison(model, list(calls), options or {})
    with torch.no_grad():
        plain = run.stage(run.count_plain) if count_plain else None
        report = run.stage(run.explain)
        error = run.stage(run.max_error)
        graphs, reused = run.stage(run.reuse) or (None, 0)
    torch.compiler.reset()
    regions = report.regions if report else ()
    matched = sum(r.matched for r in regions)
    reason = run.reason or _why_not(report, reused)
    present = max(len(regions), expected_regions)
    numbers = (name, plain, graphs, matched, present, error, reused)
    return CompatRow(*numbers, reason, idiom, version)


def table(rows: Sequence[CompatRow], tablefmt: str = "simple") -> str:
    """The rows as text; `tablefmt` is tabulate's. Empty columns are left out."""
    cells = [
        (
            r.name, r.idiom, r.version, _shown(r.graphs_plain), _shown(r.graphs_moeca),
            f"{r.regions_matched}/{r.regions_present}",
            "-" if r.max_error is None else f"{r.max_error:.1e}", r.reuse_steps, r.reason,
        )
        for r in rows
    ]  # fmt: skip
    shown = [i for i in range(len(HEADERS)) if any(row[i] != "" for row in cells)] or [0]
    widths = [34 if i == 0 else 60 if i == len(HEADERS) - 1 else None for i in shown]
    return tabulate(
        [[row[i] for i in shown] for row in cells],
        [HEADERS[i] for i in shown],
        tablefmt=tablefmt,
        disable_numparse=True,
        maxcolwidths=None if tablefmt != "simple" else widths,
    )


class _Comparison:
    """The stages, each from a clean Dynamo; the first failure is kept."""

    def __init__(self, model: nn.Module, calls: list[Call], options: dict[str, Any]) -> None:
        self.model, self.calls, self.options = model, calls, options
        self.reason = ""

    def stage(self, run: Callable[[], Any]) -> Any:
        """What `run` returns; None where it raises."""
        torch.compiler.reset()
        try:
            return run()
        except Exception as error:  # the model and the compilers below it: they raise anything
            text = str(error).strip().split("\n")[0]
            self.reason = self.reason or f"{run.__name__}: {type(error).__name__}: {text}"
            return None

    def count_plain(self) -> int:
        """Graphs of torch.compile for two calls, without compiling them."""
        counted = _Counted(lambda gm, _: gm.forward)
        compiled = torch.compile(self.model, backend=counted)
        for args, kwargs in (self.calls * 2)[:2]:
            compiled(*args, **kwargs)
        return counted.graphs

    def explain(self) -> Explanation:
        """Regions and near misses."""
        args, kwargs = self.calls[0]
        return explain(self.model, *args, **kwargs)

    def max_error(self) -> float:
        """Without caching, against eager."""
        compiled = self._compiled(_CountedMoeca(moeca), interval=1)
        errors = []
        for args, kwargs in self.calls[:STEPS]:
            ours, eager = compiled(*args, **kwargs), self.model(*args, **kwargs)
            errors.append(relative_error(ours, eager))
        return max(errors)

    def reuse(self) -> tuple[int, int]:
        """(graphs of two calls, reuse steps of all)."""
        counted = _CountedMoeca(moeca)
        compiled = self._compiled(counted, interval=STEPS)
        graphs = 0
        with self._one_generation(compiled):
            for number, (args, kwargs) in enumerate((self.calls * STEPS)[:STEPS]):
                compiled(*args, **kwargs)
                graphs = counted.graphs if number < 2 else graphs
        return graphs, stats(compiled).reuse_steps

    def _one_generation(self, compiled: Any) -> contextlib.AbstractContextManager[None]:
        """Repeats of one call have no falling timestep that would tell."""
        return generation(compiled) if len(self.calls) == 1 else contextlib.nullcontext()

    def _compiled(self, backend: _Counted, interval: int) -> Any:
        args, kwargs = self.calls[0]
        prepare(self.model, *args, **kwargs)
        # rows are what has to be proved: the default, "auto", may skip steps without any
        options = {"policy": "moeca", **self.options, "interval": interval}
        return torch.compile(self.model, backend=backend, options=options)


class _Counted:
    """A backend, and how many graphs it was handed."""

    def __init__(self, backend: Callable[..., Any]) -> None:
        self.graphs = 0
        self._backend = backend

    def __call__(self, gm: Any, inputs: Any, **settings: Any) -> Callable[..., Any]:
        self.graphs += 1
        return self._backend(gm, inputs, **settings)


class _CountedMoeca(_Counted):
    """The same for this package's backend, whose capture has to know it."""

    _moeca_backend = True

    def reset(self) -> None:
        """Called by torch.compiler.reset()."""
        moeca.reset()  # type: ignore[attr-defined]


def relative_error(output: Any, expected: Any) -> float:
    """||output - expected|| / ||expected|| over all floating-point tensors of two outputs."""
    pairs = list(zip(_tensors(output), _tensors(expected), strict=True))
    for ours, theirs in pairs:
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            raise ValueError(
                f"output {tuple(ours.shape)} {ours.dtype}, eager gives {tuple(theirs.shape)} "
                f"{theirs.dtype}"
            )
    gap = sum(float((a.double() - b.double()).norm() ** 2) for a, b in pairs)
    size = sum(float(b.double().norm() ** 2) for _, b in pairs)
    return (gap / max(size, 1e-300)) ** 0.5


def _tensors(output: Any) -> Iterator[Tensor]:
    return (v for v in leaves(output)[0] if isinstance(v, Tensor) and v.is_floating_point())


def _why_not(report: Explanation | None, reused: int) -> str:
    if report is None:
        return ""
    missed = [r for r in report.regions if not r.matched]
    if missed:
        return f"{missed[0].name}: {missed[0].what}"
    if report.break_reasons:
        return report.break_reasons[0].split("\n")[0]
    return (*report.notes, "" if reused else "no reuse step")[0]


def _shown(count: int | None) -> str:
    return "-" if count is None else str(count)
