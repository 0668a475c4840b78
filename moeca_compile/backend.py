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
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from .capture import Phase, RootRegistry, wrap_fragment
from .capture.banks import find_banks
from .debug.dump import Dumper
from .errors import UnsupportedError
from .graph.retrace import Untraceable
from .lowering.variants import Variants
from .options import Options
from .passes.count_flops import count_costs
from .pipeline import Analysis, analyse
from .runtime.entry import CompiledEntry
from .runtime.inputs import find_roles
from .runtime.registry import REGISTRY
from .torch_compat import inductor_fallback, traced_frame

log = logging.getLogger(__name__)
ROOTS = RootRegistry()


def moeca(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | Options | None = None,
    mode: str | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compile one Dynamo graph. options: see `Options`; mode: Inductor's.

    Raises OptionsError for bad options and, with `strict=True`, UnsupportedError where the graph
    cannot be cached.
    """
    parsed = Options.parse(options)
    config = torch._inductor.list_mode_options(mode) if mode else {}
    compiled = _compile(gm, example_inputs, parsed, config)
    return wrap_fragment(compiled, ROOTS)


moeca._moeca_backend = True  # type: ignore[attr-defined]  capture acts for this backend only


def _reset() -> None:
    REGISTRY.clear()
    ROOTS.forget()


moeca.reset = _reset  # type: ignore[attr-defined]  called by torch._dynamo.reset()


def _compile(
    gm: GraphModule, inputs: Sequence[Any], options: Options, config: dict[str, Any]
) -> Callable[..., Any]:
    call = ROOTS.current_call()
    root = call.root if call is not None else None
    if root is not None and _undecided(root):
        return Fragment(gm, root, config)
    reason = _unsupported(inputs)
    if reason:
        return _plain(gm, inputs, options, config, reason)
    if any(isinstance(v, (int, torch.SymInt)) for v in inputs):
        return PerShape(gm, inputs, options, config, root)
    try:
        return _entry(gm, inputs, options, config, root)
    except Untraceable as error:
        return _plain(gm, inputs, options, config, str(error))


def _undecided(root: nn.Module) -> bool:
    """Whether this is a piece of a model whose dispatch is still to be captured."""
    frame, state = traced_frame(), ROOTS.find(root)
    deciding = state is None or state.phase in (Phase.NEW, Phase.INSTALLED)
    possible = not torch.is_grad_enabled() and not root.training and bool(find_banks(root))
    return frame is not None and deciding and possible and (frame.breaks or state is not None)


class Fragment:
    """A piece of a model that is about to be captured whole: run as it is, once.

    If the capture fails the piece stays in use, and Inductor compiles it at its next call.
    """

    def __init__(self, gm: GraphModule, root: nn.Module, config: dict[str, Any]):
        self._gm = gm
        self._root = weakref.ref(root)
        self._config = config
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self._compiled is None:
            root = self._root()
            state = ROOTS.find(root) if root is not None else None
            if state is None or state.phase is not Phase.REFUSED:
                return self._gm.forward(*args)
            self._compiled = torch.compile(self._gm, backend="inductor", options=self._config)
        return self._compiled(*args)


def _entry(
    gm: GraphModule, inputs: Sequence[Any], options: Options, config: dict[str, Any], root: Any
) -> Callable[..., Any]:
    """A cached entry, or plain Inductor where no pass found anything to do."""
    dumper = Dumper.below(options.resolved_dump_dir, "graph")
    analysis = analyse(gm, inputs, options, dumper)
    if not analysis.regions.moe and not analysis.normalized:
        return _plain(gm, inputs, options, config, _why_no_layer(analysis))
    roles = find_roles(analysis.aten, options.timestep)
    _check_timestep(roles.timestep, roles.names, analysis, options)
    variants = Variants(analysis, options, config, dumper)
    costs = count_costs(analysis.aten, analysis.plan, options)
    entry = CompiledEntry(variants, options, roles, costs, root)
    for miss in analysis.missed:
        log.info("%s %s not cached: %s", miss.kind, miss.name, miss.reason)
    REGISTRY.add(root, entry)
    return entry


def _plain(
    gm: GraphModule,
    inputs: Sequence[Any],
    options: Options,
    config: dict[str, Any],
    reason: str,
) -> Callable[..., Any]:
    """Plain Inductor on Dynamo's own graph."""
    frame = traced_frame()
    fragment = frame is not None and frame.breaks
    if options.strict and not fragment:
        raise UnsupportedError(f"strict=True: this graph cannot be cached: {reason}")
    log.log(logging.DEBUG if fragment else logging.WARNING, "plain Inductor: %s", reason)
    return inductor_fallback(gm, list(inputs), config)


def _unsupported(inputs: Sequence[Any]) -> str:
    """Why this graph runs as plain Inductor whatever is in it; empty if nothing stands against."""
    if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in inputs):
        return "gradients are on: call the model under torch.no_grad() or torch.inference_mode()"
    if any(isinstance(v, Tensor) and 0 in v.shape for v in inputs):
        return "an empty input"
    devices = {v.device.type for v in inputs if isinstance(v, Tensor)} - {"cpu", "cuda"}
    if devices:
        return f"device {sorted(devices)[0]} is not supported"
    return ""


def _why_no_layer(analysis: Analysis) -> str:
    missed = [m for m in analysis.missed if m.kind == "moe"]
    if missed:
        return f"{missed[0].name}: {missed[0].reason}"
    return "no mixture-of-experts layer in this graph"


def _check_timestep(
    found: int | None, names: Sequence[str], analysis: Analysis, options: Options
) -> None:
    if found is not None or options.interval == 1 or not analysis.regions.moe:
        return
    message = (
        f"no timestep among the tensor arguments {list(names)}: name it with "
        'options={"timestep": ...} or sample inside moeca_compile.generation(compiled); '
        "without either every step is a refresh"
    )
    if options.strict:
        raise UnsupportedError(f"strict=True: {message}")
    log.warning(message)


class PerShape:
    """A graph that Dynamo made dynamic: one static entry for every set of sizes it meets."""

    def __init__(
        self,
        gm: GraphModule,
        inputs: Sequence[Any],
        options: Options,
        config: dict[str, Any],
        root: Any,
    ):
        self._make = lambda args: _entry_or_eager(gm, args, options, config, root)
        self._sizes = [i for i, v in enumerate(inputs) if isinstance(v, (int, torch.SymInt))]
        self._entries: dict[tuple[int, ...], Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        key = tuple(args[i] for i in self._sizes)
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = self._make(args)
        return entry(*args)


def _entry_or_eager(
    gm: GraphModule, args: Sequence[Any], options: Options, config: dict[str, Any], root: Any
) -> Callable[..., Any]:
    try:
        return _entry(gm, args, options, config, root)
    except Untraceable as error:
        log.warning("not cached: %s", error)
        return gm.forward
