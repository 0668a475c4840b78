"""The `torch.compile` backend: graph -> pipeline -> variants -> callable.

    torch.compile(model, backend="moeca", options={"interval": 4})

What cannot be cached is compiled by plain Inductor, with one line that says so; `strict=True`
raises instead. A fragment of a model whose dispatch breaks the graph is compiled as it is and
starts the capture (capture/trigger.py), so that the next step comes as one graph.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from .calibration.check import check_model
from .capture import Phase, RootCall, wrap_fragment
from .capture.install import keeps_host_reads
from .capture.roots import entry_codes
from .capture.stacked import may_dispatch
from .debug.dump import Dumper
from .graph.gradients import strip_no_grad
from .graph.retrace import Untraceable
from .lowering.variants import Variants
from .options import Options
from .passes.count_flops import count_costs
from .pipeline import Analysis, analyse
from .reasons import (
    NO_LAYER,
    changing_number,
    first_line,
    unsupported,
    why_no_layer,
)
from .request import RECAPTURE, ROOTS, Request, refused_state
from .runtime.entry import CompiledEntry
from .runtime.inputs import find_roles
from .runtime.registry import REGISTRY
from .torch_compat import (
    OpenSize,
    guard_identity,
    mode_options,
    traced_frame,
    traced_module,
)
from .uncached import (
    TOLD,
    Fragment,
    inductor_later,
    report_no_timestep,
    report_plain,
    report_refused,
    run_plain,
)

log = logging.getLogger(__name__)
MAX_SHAPES = 16  # each has kernels and rows of its own; a number in no tensor's shape would go on
TOO_MANY = f"called with more than {MAX_SHAPES} sets of sizes"


def moeca(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | Options | None = None,
    mode: str | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compile one Dynamo graph. options: see `Options`; mode: Inductor's, before `options.mode`.

    Raises OptionsError for bad options and, with `strict=True`, UnsupportedError where the graph
    cannot be cached.
    """
    if torch.is_grad_enabled() and strip_no_grad(gm):
        with torch.no_grad():
            return torch.no_grad()(moeca(gm, example_inputs, options=options, mode=mode))
    given = {"mode": mode, "options": options}
    call = ROOTS.current_call()
    parsed = Options.parse(options)
    chosen = mode or parsed.mode
    root = call.root if call is not None else traced_module()
    request = Request(
        parsed,
        mode_options(chosen) if chosen else {},
        {name: value for name, value in given.items() if value},
        weakref.ref(root) if root is not None else None,
    )

    def compile_now() -> Callable[..., Any]:
        return _compile(gm, example_inputs, request, call)

    compiled = compile_now() if call is None else RECAPTURE.wrap(gm, call, compile_now)
    return wrap_fragment(compiled, ROOTS)


moeca._moeca_backend = True  # type: ignore[attr-defined]  capture acts for this backend only


def _reset() -> None:
    REGISTRY.clear()
    ROOTS.forget()
    TOLD.clear()


moeca.reset = _reset  # type: ignore[attr-defined]  called by torch.compiler.reset()


def _compile(
    gm: GraphModule, inputs: Sequence[Any], request: Request, call: RootCall | None
) -> Callable[..., Any]:
    if call is not None and _undecided(call):
        return Fragment(gm, request)
    reason = unsupported(inputs) or changing_number(gm, inputs, request.options)
    dynamic = any(isinstance(v, (int, torch.SymInt)) for v in inputs)
    if dynamic and not reason and refused_state(request.root) is None:
        _serve_only(request.root)
        return PerShape(gm, inputs, request)
    found = reason or (NO_LAYER if dynamic else _entry(gm, inputs, request))
    if isinstance(found, str):
        report_plain(found, request)
        return run_plain(gm, inputs, request)
    _serve_only(request.root)
    return found


def _serve_only(root: nn.Module | None) -> None:
    """An entry holds rows and counts of one model: another one of its class gets its own.

    Where the model is no local variable of the frame (a compiled function that closes over it)
    they share an entry, and every change between them is one of the weights: a refresh.
    """
    if root is not None:
        guard_identity(root)


def _undecided(call: RootCall) -> bool:
    """Whether this is a piece of a model whose dispatch is still to be captured."""
    frame, state, root = traced_frame(), ROOTS.find(call.root), call.root
    piece = frame is not None and (frame.breaks or frame.code not in entry_codes(call))
    deciding = state is None or state.phase in (Phase.NEW, Phase.INSTALLED)
    possible = not torch.is_grad_enabled() and not root.training and bool(may_dispatch(root))
    return piece and deciding and possible


class PerShape:
    """A graph that Dynamo made dynamic: one static entry for every set of sizes it meets.

    A graph without anything to cache, and sizes past MAX_SHAPES, run as plain Inductor.
    """

    def __init__(self, gm: GraphModule, inputs: Sequence[Any], request: Request):
        self._gm = gm
        self._request = request
        self._sizes = [i for i, v in enumerate(inputs) if isinstance(v, (int, torch.SymInt))]
        self._entries: dict[tuple[int, ...], Callable[..., Any]] = {}
        self._uncached: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        key = tuple(args[i] for i in self._sizes)
        entry = self._entries.get(key) or self._uncached
        if entry is None:
            entry = self._make(key, args)
        return entry(*args)

    def _make(self, key: tuple[int, ...], args: Sequence[Any]) -> Callable[..., Any]:
        full = len(self._entries) >= MAX_SHAPES
        found = TOO_MANY if full else _entry(self._gm, args, self._request)
        if isinstance(found, str):
            report_plain(found, self._request)
            self._uncached = inductor_later(self._gm, self._request)
            return self._uncached
        self._entries[key] = found
        return found


def _entry(gm: GraphModule, inputs: Sequence[Any], request: Request) -> CompiledEntry | str:
    """A cached entry, or why no pass found anything to do."""
    options, root = request.options, request.root
    if options.policy_file is not None:
        check_model(options.policy_file, root)
    dumper = Dumper.below(options.resolved_dump_dir, "graph")
    try:
        analysis = analyse(gm, inputs, options, dumper)
    except Untraceable as error:
        return str(error)
    except Exception as error:  # a size known at run time only may stop any pass
        if not keeps_host_reads(root) and not isinstance(error, OpenSize):
            raise
        return f"a graph with sizes known at run time only: {first_line(error)}"
    dense = not analysis.regions.moe and not analysis.normalized
    if dense and not _whole_step(analysis, options):
        return why_no_layer(analysis)
    roles = find_roles(analysis.aten, options.timestep)
    report_no_timestep(roles.timestep, roles.names, analysis, options)
    if reason := analysis.plan.histories.refused:
        report_refused(reason, request)
    variants = Variants(analysis, options, request.config, dumper)
    costs = partial(count_costs, analysis.aten, analysis.plan, options)
    entry = CompiledEntry(variants, options, roles, costs, root)
    if left := [region.name for region in analysis.plan.left_out]:
        log.warning(
            "max_cache_bytes=%s: computed as written in every step: %s",
            options.max_cache_bytes,
            ", ".join(left),
        )
    for miss in analysis.missed:
        log.info("%s %s not cached: %s", miss.kind, miss.name, miss.reason)
    REGISTRY.add(root, entry, request.settings)
    return entry


def _whole_step(analysis: Analysis, options: Options) -> bool:
    """Whether a graph without experts is a denoiser of which whole steps can be forecast."""
    frame = traced_frame()
    piece = frame is not None and frame.breaks
    if piece or not analysis.plan.variants:
        return False
    roles = find_roles(analysis.aten, options.timestep)
    return roles.timestep is not None and roles.sample is not None
