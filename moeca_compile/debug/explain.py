"""What the compiler makes of a model, without compiling it: regions, near misses, cache bytes.

print(moeca_compile.explain(model, x, t, y))
kind       module         matched    what or why not                 where
moe        blocks.0.moe   yes        8 experts, top-2, 1 shared
attention  blocks.0.attn  yes        K and V cached
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate
from torch import nn
from torch.fx import GraphModule

from ..capture import CaptureReport, compiling_for_moeca, install, uninstall
from ..capture.install import is_installed
from ..capture.sandbox import copy_arguments, undisturbed
from ..graph.region import NoMatch, Regions, source_line
from ..graph.retrace import Untraceable
from ..options import Options
from ..pipeline import Analysis, analyse
from ..torch_compat import backend_settings, compile_apart, compiled_root
from .dump import Dumper


@dataclass(frozen=True)
class ExplainedRegion:
    """kind: "moe" or "attention"; name: module path; reason: why not, empty when matched.

    num_experts, top_k: of a MoE layer, else None. location: file:line in the user's code.
    """

    kind: str
    name: str
    matched: bool
    reason: str = ""
    detail: str = ""
    location: str = ""
    num_experts: int | None = None
    top_k: int | None = None


@dataclass(frozen=True)
class Explanation:
    """cache_bytes: per lane, for these inputs. graph_breaks: graphs Dynamo makes, minus one."""

    regions: tuple[ExplainedRegion, ...]
    graph_breaks: int
    cache_bytes: int
    capture: CaptureReport | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [
            (r.kind, r.name, "yes" if r.matched else "no", r.reason or r.detail, r.location)
            for r in self.regions
        ]
        headers = ("kind", "module", "matched", "what or why not", "where")
        widths = [None, 40, None, 60, 60]
        table = tabulate(rows, headers=headers, tablefmt="simple", maxcolwidths=widths)
        total = f"graph breaks {self.graph_breaks}, cache {self.cache_bytes:,} bytes per lane"
        return "\n".join([table if rows else "no regions", total, *self.notes])


def explain(model: nn.Module | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Analyse `model` on example inputs; the model is left as it was.

    With the options `model` was compiled with; with default options for a plain module.

    Runs the model once or twice without compiling kernels. Raises TypeError for something that
    leads to no module; what the model itself raises comes through.
    """
    root = compiled_root(model)
    if root is None:
        raise TypeError(f"explain: expected a module, got {type(model).__name__}")
    settings = backend_settings(model) or {}
    options = Options.parse(settings.get("options"))
    installed_before = is_installed(root)
    capture = None
    if not installed_before:
        capture = install(root, args, kwargs, is_active=compiling_for_moeca)
    try:
        analyser = _Analyser(options)
        if root.training:
            analyser.notes.append("the model is in training mode: call model.eval() to sample")
        with undisturbed(root):
            compile_apart(root, analyser)(*copy_arguments(args), **copy_arguments(kwargs))
    finally:
        if not installed_before:
            uninstall(root)
    return _explanation(analyser, capture)


class _Analyser:
    """A backend that analyses every graph it is handed and runs it as it is."""

    _moeca_backend = True

    def __init__(self, options: Options) -> None:
        self.graphs = 0
        self._options = options
        self.analyses: list[Analysis] = []
        self.notes: list[str] = []

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        try:
            self.analyses.append(analyse(gm, inputs, self._options, Dumper(None)))
        except Untraceable as error:
            self.notes.append(f"graph {self.graphs}: not analysed: {error}")
        return gm.forward


def _explanation(analyser: _Analyser, capture: CaptureReport | None) -> Explanation:
    regions: list[ExplainedRegion] = []
    for analysis in analyser.analyses:
        regions += _matched(analysis.regions)
        regions += [_missed(m) for m in analysis.missed]
    known = {r.name for r in regions}
    for module in capture.modules if capture else ():
        if not module.accepted and module.path not in known:
            regions.append(
                ExplainedRegion(
                    "moe", module.path, False, f"not captured: {module.reason}",
                    location=module.location, num_experts=module.num_experts,
                )
            )  # fmt: skip
    return Explanation(
        tuple(regions),
        max(0, analyser.graphs - 1),
        sum(a.plan.layout.nbytes for a in analyser.analyses),
        capture,
        tuple(analyser.notes),
    )


def _matched(regions: Regions) -> list[ExplainedRegion]:
    found = []
    for moe in regions.moe:
        detail = f"{moe.num_experts} experts, top-{moe.top_k}, {len(moe.shared)} shared"
        found.append(
            ExplainedRegion(
                "moe", moe.name, True, "", detail, source_line(moe.routed),
                moe.num_experts, moe.top_k,
            )
        )  # fmt: skip
        for a in moe.attention:
            cached = "K and V cached" if a.key_value else "K and V recomputed in full"
            found.append(
                ExplainedRegion("attention", a.name, True, "", cached, source_line(a.core))
            )
    return found


def _missed(miss: NoMatch) -> ExplainedRegion:
    location = source_line(miss.node) or f"node {miss.node.name}"
    return ExplainedRegion(miss.kind, miss.name, False, miss.reason, location=location)
