"""The same generation twice, call by call: everything computed, and with the cache.

    sampler(compiled) --every call--+--> full    -> output goes back to the sampler
                                    +--> cached  -> compared layer by layer, then thrown away

Both see the same inputs, so a difference is the cache's and not that of a trajectory that has
drifted away. Graphs run as they are, without Inductor: slow, ready at once, and row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..capture import compiling_for_moeca, install, uninstall
from ..capture.install import is_installed
from ..capture.sandbox import undisturbed
from ..graph.retrace import Untraceable
from ..lowering.variants import Variants
from ..options import Options
from ..passes.count_flops import count_costs
from ..pipeline import Analysis, analyse
from ..reasons import why_no_layer
from ..runtime.entry import CompiledEntry
from ..runtime.history import History
from ..runtime.inputs import find_roles
from ..torch_compat import compile_apart
from .divergence import Comparison, Deviation, StepDeviation
from .dump import Dumper
from .guard_calls import GuardCall, GuardWatch
from .row_details import RowWatch
from .taps import Tap, add_taps


def compare(
    model: nn.Module,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    generate: Callable[[Callable[..., Any]], Any],
    options: Options,
    *,
    bound: float,
    on_step: Callable[[], None] = lambda: None,
) -> Comparison:
    """Run `generate(model to call)` once, with every call made both ways.

    call: arguments of one call of `model`, for the capture. bound: relative difference of a layer's
    output at which two runs have parted. The model is left as it was.
    """
    installed_before = is_installed(model)
    if not installed_before:
        install(model, call[0], call[1], is_active=compiling_for_moeca)
    backend = _BothWays(options, bound, on_step)
    try:
        with undisturbed(model):
            generate(compile_apart(model, backend))
    finally:
        if not installed_before:
            uninstall(model)
    return Comparison(bound, options, tuple(backend.steps), tuple(backend.notes))


class _BothWays:
    """A backend whose callables run both ways and return what the full way gave."""

    _moeca_backend = True

    def __init__(self, options: Options, bound: float, on_step: Callable[[], None]) -> None:
        self.options = options
        self.bound = bound
        self.on_step = on_step
        self.steps: list[StepDeviation] = []
        self.notes: list[str] = []

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            analysis = analyse(gm, inputs, self.options, Dumper(None))
        except Untraceable as error:
            self.notes.append(f"a graph was not analysed: {error}")
            return gm.forward
        if not analysis.plan.layers:
            self.notes.append(f"a graph runs as it is: {why_no_layer(analysis)}")
            return gm.forward
        return _Pair(analysis, self)


class _WatchedVariants(Variants):
    """Variants that run as dialect graphs; the guards of the last run are in `watched`."""

    def __init__(self, analysis: Analysis, options: Options) -> None:
        super().__init__(analysis, options, {}, Dumper(None))
        self.watched: dict[str, GuardWatch] = {}

    def _compile(self, variant: str) -> Callable[..., Any]:
        graph, _ = self.dialect(variant)
        self.watched[variant] = GuardWatch(graph)
        return self.watched[variant]

    def guards(self, kind: str) -> list[GuardCall]:
        """What the guards decided in the last step, which was of this kind."""
        return list(self.watched[kind].calls) if kind in self.watched else []


class _Pair:
    """One graph, both ways, and what became of each step."""

    def __init__(self, analysis: Analysis, run: _BothWays) -> None:
        options = run.options
        roles = find_roles(analysis.aten, options.timestep)
        self._costs = count_costs(analysis.aten, analysis.plan, options)
        self._outputs = len(analysis.aten.gm.graph.output_node().args[0])  # type: ignore[arg-type]
        self._taps = add_taps(analysis)
        self._variants = _WatchedVariants(analysis, options)
        self._entry = CompiledEntry(self._variants, options, roles, lambda: self._costs, None)
        self._entry.history = History(analysis.plan, options)
        self._rows = RowWatch(analysis.plan.layers)
        self._run = run

    def __call__(self, *args: Any) -> Sequence[Any]:
        with torch.no_grad():
            full = self._variants.get("plain")(*(args[p] for p in self._entry.positions))
            full = [v.clone() if isinstance(v, Tensor) else v for v in full]
            cached = self._entry(*args)
        self._compare(full, cached)
        self._run.on_step()
        return full[: self._outputs]

    def _compare(self, full: Sequence[Tensor], cached: Sequence[Tensor]) -> None:
        history = self._entry.history
        assert history is not None and history.steps, "every call is recorded"
        record = history.steps[-1]
        guards = self._variants.guards(record.decision.kind)
        lane = record.place.lane if record.place is not None else 0
        self._rows.ran(lane, record.decision.kind, guards)
        found = []
        inside = zip(self._taps, full[self._outputs :], cached[self._outputs :])
        for tap, wanted, got in inside:  # nothing inside where the whole step was forecast
            size = relative_difference(wanted, got)
            rows = ()
            if size > self._run.bound:
                rows = self._rows.worst(lane, tap, wanted, got, guards)
            found.append(Deviation(tap.layer, tap.part, size, rows))
        found.append(Deviation("model", "output", relative_difference(full[0], cached[0])))
        number = len(self._run.steps)
        self._run.steps.append(StepDeviation.of(number, record, tuple(found), guards))


def relative_difference(wanted: Tensor, got: Tensor) -> float:
    """|got - wanted| / |wanted|, Euclidean over all elements; NaN counts as infinite."""
    difference = (got.double() - wanted.double()).norm()
    value = float(difference / wanted.double().norm().clamp(min=1e-30))
    return value if value == value else float("inf")


__all__ = ["Tap", "compare", "relative_difference"]
