"""One compiled callable per variant of a step, made when it is first needed.

Variants(analysis).get("reuse")(*model inputs, *caches, *counts, *mix, *stacks) -> outputs, counters
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..debug.dump import Dumper
from ..graph.retrace import fake_like
from ..options import Options
from ..passes.insert_cache import VariantInputs, variant_outputs
from ..passes.reuse_inputs import allowed_counts, counted_sizes
from ..pipeline import Analysis
from ..runtime.inputs import is_weight
from ..torch_compat import compiles_kernels, inductor, known_options, mark_static
from .lower import lower, share_counts, trace
from .pieces import compile_in_pieces
from .weight_stacks import WeightStacks

# Moving reads of a cache behind the writes would make Inductor clone the cache: keep the order.
KEEP_ORDER = {"reorder_for_locality": False}
# The guard works on [T, K] and [T, K, K] values. Inductor's C++ takes sixteen elements at once with
# all but K of them masked; one at a time is three to ten times as fast (docs/speed.md).
SMALL_DIMS = {"cpp.enable_loop_tail_vec": False}
HOST_READS = {torch.Tag.cudagraph_unsafe, torch.Tag.data_dependent_output}
log = logging.getLogger(__name__)


def host_reads(graph: GraphModule) -> list[Node]:
    """Nodes that need a value on the host. A CUDA graph cannot hold them, and pieces of one around
    them would replay little: there are some in each layer."""
    return [n for n in graph.graph.nodes if _reads(n)]


def _reads(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    if torch.Tag.dynamic_output_shape in tags:  # of the data only where it left a size open
        value = node.meta.get("val")
        return not isinstance(value, Tensor) or any(type(s) is not int for s in value.shape)
    return not HOST_READS.isdisjoint(tags)


class Variants:
    """Traces, lowers and compiles variants of one analysed graph. `config`: Inductor options."""

    def __init__(
        self, analysis: Analysis, options: Options, config: dict[str, Any], dumper: Dumper
    ):
        self.analysis = analysis
        self.options = options
        self.dumper = dumper
        # CUDA graphs replay fixed sizes: what a budget allows is then written into the graph.
        on_cuda = any(s.device.type == "cuda" for s in analysis.plan.layout.specs)
        self.fixed_counts = on_cuda and bool(config.get("triton.cudagraphs"))
        self.stacks = WeightStacks()
        self.compile_seconds: dict[str, float] = {}
        self.pieces: dict[str, str] = {}  # of variants not compiled whole: what they are made of
        self._config = config
        self._compiled: dict[str, Callable[..., Any]] = {}

    def get(self, variant: str) -> Callable[..., Any]:
        """The compiled variant: one of insert_cache.VARIANTS, or "probe"."""
        found = self._compiled.get(variant)
        if found is None:
            started = time.perf_counter()
            found = self._compiled[variant] = self._compile(variant)
            self.compile_seconds[variant] = time.perf_counter() - started
        return found

    def counts(self, variant: str) -> int:
        """How many CPU count inputs the variant takes behind its caches."""
        budgeted = variant == "reuse" and self.options.budget is not None
        return 1 if budgeted and not self.fixed_counts else 0

    def steer(self, options: Options) -> None:
        """Go on with other options that the same graphs serve, but for counts written into them."""
        if self.fixed_counts and options.budget != self.options.budget:
            self._compiled.pop("reuse", None)
        self.options = options

    def mixed(self, variant: str) -> int:
        """How many coefficients of the policy the variant takes, as one float32 tensor."""
        return self.analysis.plan.coefficients(variant)

    def dialect(self, variant: str) -> tuple[Any, list[Tensor]]:
        """(graph, fake inputs) with the `moeca::` ops in it; it runs as it is, only slowly."""
        aten, plan = self.analysis.aten, self.analysis.plan
        holes = aten.placeholders
        fakes = [n.meta["val"] for n in holes]
        specs = plan.layout.specs if variant != "plain" else ()
        scratch = plan.scratch if variant == "refresh" else frozenset()
        with aten.fake_mode:
            for spec in specs:
                rows = spec.shape[0] - (spec.name in scratch)
                fakes.append(
                    torch.empty((rows, *spec.shape[1:]), dtype=spec.dtype, device=spec.device)
                )
            fakes += [torch.empty(len(plan.layers), 3, dtype=torch.int64)] * self.counts(variant)
            if mixed := self.mixed(variant):
                fakes.append(torch.empty(mixed, device=plan.device))

        def run(*args: Tensor) -> Any:
            caches = dict(zip((s.name for s in specs), args[len(holes) :], strict=False))
            rest = list(args[len(holes) + len(specs) :])
            counts = rest.pop(0) if self.counts(variant) else self._fixed(variant)
            extra = VariantInputs.of(plan, caches, counts, rest[0] if rest else None)
            inputs = dict(zip(holes, args, strict=False))
            outputs, found = variant_outputs(aten.gm, plan, self.options, variant, inputs, extra)
            return (*outputs, *found)

        started = time.perf_counter()
        dialect = trace(run, fakes, aten.fake_mode)
        elapsed = (time.perf_counter() - started) * 1e3
        self.dumper.graph(f"{variant}.dialect", dialect, elapsed)
        return dialect, fakes

    def _fixed(self, variant: str) -> list[list[int]] | None:
        """Counts as constants of the graph; None where they are an input, or there is no budget."""
        budget = self.options.budget
        if variant != "reuse" or budget is None:
            return None
        return allowed_counts(self.analysis.plan.layers, budget)

    def static_inputs(self, variant: str) -> set[int]:
        """Positions of the inputs that stay where they are: weights, and a lane's caches."""
        inputs = len(self.analysis.aten.inputs)
        caches = len(self.analysis.plan.layout.specs) if variant != "plain" else 0
        return self.weights | set(range(inputs, inputs + caches))

    @property
    def weights(self) -> set[int]:
        """Positions of the weights, the same in every variant."""
        return {i for i, each in enumerate(self.analysis.aten.inputs) if is_weight(each)}

    def _inductor_config(self, variant: str, graph: GraphModule) -> dict[str, Any]:
        config = {**KEEP_ORDER, **self._config} if variant == "reuse" else dict(self._config)
        if variant != "plain":
            config = {**known_options(SMALL_DIMS), **config}
        if config.get("triton.cudagraphs") and (reads := host_reads(graph)):
            log.info("%s: no CUDA graph, %s waits for the device", variant, reads[0].target)
            del config["triton.cudagraphs"]
        return config

    def lowered(self, variant: str) -> tuple[Any, list[Tensor]]:
        """(graph, fake inputs) as handed to Inductor."""
        dialect, fakes = self.dialect(variant)
        started = time.perf_counter()
        graph = lower(dialect, self.analysis.aten.fake_mode)
        elapsed = (time.perf_counter() - started) * 1e3
        self.dumper.graph(f"{variant}.lowered", graph, elapsed)
        return graph, fakes

    def _compile(self, variant: str) -> Callable[..., Any]:
        if not compiles_kernels():  # lowering doubles the time and would gain nothing
            return self.dialect(variant)[0]
        graph, fakes = self.lowered(variant)
        config = self._inductor_config(variant, graph)
        static = self.static_inputs(variant)
        if variant != "plain":  # its calls belong to no generation
            behind = len(fakes)
            fakes += self.stacks.hoist(variant, graph, self.weights)
            static |= set(range(behind, len(fakes)))

        def compile_one(gm: GraphModule, inputs: list[Any], stay: set[int]) -> Callable[..., Any]:
            mark_static(gm, stay)
            mode = self.analysis.aten.fake_mode
            return inductor(gm, [fake_like(mode, i) for i in inputs], mode, config)

        if self.options.compile_repeats and not config.get("triton.cudagraphs"):
            pieces = compile_in_pieces(graph, static, compile_one)
            if pieces is not None:
                self.pieces[variant] = pieces.summary
                self.dumper.text(f"{variant}.pieces", pieces.summary + "\n")
                return pieces
        if self.counts(variant):
            sizes = [counted_sizes(layer) for layer in self.analysis.plan.layers]
            place = len(self.analysis.aten.inputs) + len(self.analysis.plan.layout.specs)
            counts = graph.graph.find_nodes(op="placeholder")[place]
            share_counts(graph, counts, [sizes.index(each) for each in sizes])
        return compile_one(graph, fakes, static)
