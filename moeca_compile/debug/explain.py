"""What the compiler makes of a model, without compiling it: regions, near misses, cache bytes.

print(moeca_compile.explain(model, x, t, y))
kind       module         matched    what or why not                 where
moe        blocks.0.moe   yes        8 experts, top-2, 1 shared
attention  blocks.0.attn  yes        output kept
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.fx import GraphModule

from ..capture import CaptureReport, compiling_for_moeca, install, uninstall
from ..capture.install import is_installed
from ..capture.sandbox import copy_arguments, undisturbed
from ..graph.region import ChoiceRegion, NoMatch, source_line
from ..graph.retrace import Untraceable
from ..options import Options
from ..pipeline import Analysis, analyse
from ..reasons import NAME_ONE
from ..torch_compat import backend_settings, compile_apart, compiled_root, traced_frame
from .dump import Dumper
from .explanation import ExplainedRegion, Explanation
from .predict import predict
from .region_table import kept


def explain(model: nn.Module | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Analyse `model` on example inputs; the model is left as it was.

    With the options `model` was compiled with; with default options for a plain module. What is
    kept between steps, and its bytes, are the policy's; what is matched is the same for all.

    Runs the model once or twice without compiling kernels. Raises TypeError for something that
    leads to no module; what the model itself raises comes through.
    """
    root = compiled_root(model)
    if root is None:
        raise TypeError(f"explain: expected a module, got {type(model).__name__}")
    settings = backend_settings(model) or {}
    return explain_with(Analyser(Options.parse(settings.get("options"))), root, args, kwargs)


def explain_with(
    analyser: Analyser, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Explanation:
    """`explain` with the options, and the dumps, of `analyser`."""
    installed_before = is_installed(root)
    capture = None
    if not installed_before:
        capture = install(root, args, kwargs, is_active=compiling_for_moeca)
    try:
        if root.training:
            analyser.notes.append("the model is in training mode: call model.eval() to sample")
        with undisturbed(root):
            compile_apart(root, analyser)(*copy_arguments(args), **copy_arguments(kwargs))
    finally:
        if not installed_before:
            uninstall(root)
    return _explanation(analyser, capture)


class Analyser:
    """A backend that analyses every graph it is handed and runs it as it is.

    dumper: makes the dumper of the next graph; none by default.
    """

    _moeca_backend = True

    def __init__(
        self, options: Options, dumper: Callable[[], Dumper] = lambda: Dumper(None)
    ) -> None:
        self.graphs = 0
        self.options = options
        self.analyses: list[Analysis] = []
        self.notes: list[str] = []
        self.breaks: list[str] = []
        self._dumper = dumper

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        frame = traced_frame()
        if frame is not None and frame.breaks:
            self.breaks.append(frame.reason)
        try:
            self.analysed(analyse(gm, inputs, self.options, dumper := self._dumper()), dumper)
        except Untraceable as error:
            self.notes.append(f"graph {self.graphs}: not analysed: {error}")
        return gm.forward

    def analysed(self, analysis: Analysis, dumper: Dumper) -> None:
        """One more graph is through all passes."""
        self.analyses.append(analysis)


def _explanation(analyser: Analyser, capture: CaptureReport | None) -> Explanation:
    regions: list[ExplainedRegion] = []
    for analysis in analyser.analyses:
        regions += _matched(analysis)
        regions += [_missed(m, r.name) for r in analysis.reports for m in r.missed]
        regions += [_missed(m, "match_regions") for m in analysis.regions.missed]
    known = {r.name for r in regions}
    unmatched = not any(r.matched for r in regions)
    if unmatched and len(analyser.analyses) == 1 and not analyser.options.policy_named:
        analyser.notes.append(f"nothing is cached: no MoE layer was recognised; {NAME_ONE}")
    for module in capture.modules if capture else ():
        if not module.accepted and module.path not in known:
            regions.append(
                ExplainedRegion(
                    "moe", module.path, False, f"not captured: {module.reason}",
                    location=module.location, num_experts=module.num_experts, stage="capture",
                )
            )  # fmt: skip
    return Explanation(
        tuple(regions),
        max(0, analyser.graphs - 1),
        sum(a.plan.layout.nbytes for a in analyser.analyses),
        capture,
        tuple(analyser.notes),
        tuple(analyser.breaks),
        predict(analyser.analyses, analyser.options),
    )


def _matched(analysis: Analysis) -> list[ExplainedRegion]:
    found, plan = [], analysis.plan
    for moe in analysis.regions.moe:
        why = "max_cache_bytes" if moe in plan.left_out else ""
        top_k = None if isinstance(moe, ChoiceRegion) else moe.top_k
        found.append(
            ExplainedRegion(
                "moe", moe.name, True, why, moe.description, source_line(moe.routed),
                moe.num_experts, top_k, "match_regions", moe.routed.name,
            )
        )  # fmt: skip
        for a in moe.attention:
            found.append(
                ExplainedRegion(
                    "attention", a.name, True, why, kept(a, plan.stored), source_line(a.core),
                    stage="match_regions", node=a.root.node.name,
                )
            )  # fmt: skip
    return found


def _missed(miss: NoMatch, stage: str) -> ExplainedRegion:
    return ExplainedRegion(
        miss.kind, miss.name, False, miss.reason,
        location=source_line(miss.node), stage=stage, node=miss.node.name,
    )  # fmt: skip
