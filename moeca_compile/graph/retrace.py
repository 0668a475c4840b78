"""The Dynamo graph re-traced to pre-dispatch ATen, with static shapes of its own.

Whatever spelling the user chose, a block becomes about ten op kinds. Shapes are taken from the
real inputs: a graph that Dynamo made dynamic gets one static retrace per shape it meets, so no
pass ever adds a guard to Dynamo's shapes.

    before:  x @ w.t(), F.layer_norm, nn.SiLU()(x)      (Dynamo graph, any symbol)
    after:   aten.matmul, aten.layer_norm, aten.silu    (f32[4, 64, 128], module path, source line)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.dialect.common.cse_pass import CSEPass, get_CSE_banned_ops
from torch.fx.traceback import preserve_node_meta

from ..torch_compat import graph_module, new_fake_mode, placeholder_source
from .constant_reads import WithConstants, constants, reads_numbers
from .functional import Mutation, make_functional, mutates
from .region import source_line
from .retrace_repeats import ENTER, EXIT, RetraceRepeats


class Untraceable(Exception):
    """The graph cannot be re-traced; the message says what is in the way."""


@dataclass(frozen=True)
class Input:
    """One tensor input. position: in Dynamo's argument list; source: e.g. `L['timestep']`."""

    position: int
    source: str
    is_parameter: bool


@dataclass(frozen=True)
class AtenGraph:
    """gm: placeholders are the tensor inputs, in order; fake_mode: the mode of every `val`."""

    gm: GraphModule
    fake_mode: Any
    inputs: tuple[Input, ...]

    @property
    def placeholders(self) -> list[Node]:
        return [n for n in self.gm.graph.nodes if n.op == "placeholder"]


def retrace(gm: GraphModule, values: Sequence[Any]) -> AtenGraph:
    """Trace `gm` on the shapes of `values`, real or fake, ints for symbolic sizes.

    Raises Untraceable under autocast (its casts are not in the graph) and for inputs that are
    neither tensors nor numbers.
    """
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise Untraceable("autocast is on: cast the model instead, model.to(torch.bfloat16)")
    fake_mode = new_fake_mode()
    fakes = [fake_like(fake_mode, v) for v in values]
    tensors = [i for i, v in enumerate(fakes) if isinstance(v, Tensor)]
    known = constants(gm, fakes) if reads_numbers(gm) else {}  # real values: no mode is on yet

    def trace(interpreter: WithConstants) -> GraphModule:
        def run(*args: Tensor) -> Any:
            full = list(fakes)
            for position, value in zip(tensors, args, strict=True):
                full[position] = value
            return interpreter.run(*full)

        with torch.no_grad(), fake_mode, preserve_node_meta():
            return make_fx(run, pre_dispatch=True)(*(fakes[i] for i in tensors))

    repeats = RetraceRepeats(gm, known)
    traced = trace(repeats)
    if repeats.copied and any(map(mutates, traced.graph.nodes)):
        traced = trace(WithConstants(gm, known))  # copies do not show which values share memory
    _strip_disabled_autocast(traced)
    try:
        make_functional(traced)
    except Mutation as error:
        raise Untraceable(f"{error} ({source_line(error.node) or error.node.name})") from None
    traced.graph.eliminate_dead_code()
    merged = CSEPass(get_CSE_banned_ops())(traced)
    # the pass writes its graph down as Python, which nobody has asked for
    traced = graph_module(traced, (merged.graph_module if merged is not None else traced).graph)
    holes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    inputs = tuple(_describe(i, holes[i], values[i]) for i in tensors)
    return AtenGraph(traced, fake_mode, inputs)


def fake_like(fake_mode: Any, value: Any) -> Any:
    """A fake tensor of static shape with the value's strides; numbers stay."""
    if not isinstance(value, Tensor):
        if isinstance(value, (int, float, bool, torch.SymInt)):
            return int(value) if isinstance(value, torch.SymInt) else value
        raise Untraceable(f"a graph input of type {type(value).__name__}")
    with torch.no_grad(), fake_mode:
        sizes = [int(s) for s in value.shape]
        strides = [int(s) for s in value.stride()]
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)


def _describe(position: int, hole: Node, value: Any) -> Input:
    source = placeholder_source(hole)
    is_parameter = isinstance(value, torch.nn.Parameter) or "._parameters[" in source
    return Input(position, source, is_parameter or "._buffers[" in source)


def _strip_disabled_autocast(gm: GraphModule) -> None:
    """`autocast(enabled=False)` inside a model is a no-op once no autocast is on around it."""
    for node in reversed(list(gm.graph.nodes)):
        if node.target is EXIT:
            gm.graph.erase_node(node)
        elif node.target is ENTER:
            if node.args[2]:
                raise Untraceable("an autocast region inside the model")
            gm.graph.erase_node(node)
