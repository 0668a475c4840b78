"""A reuse step of one small model, and what its variants are lowered to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graph_runs import compile_model, only_entry
from idioms import make, trajectory


def small_run() -> tuple[Any, Tensor]:
    """(compiled model, output of its second call, a reuse step), compiled anew."""
    torch._dynamo.reset()
    model = make("split", attention="sdpa", depth=1, expert="swiglu")
    calls = trajectory(model, 2, dx=0.05)
    run = compile_model(model, calls[0], budget=0.25, order="attention_first")
    with torch.no_grad():
        return run, [run(*call) for call in calls][-1]


def reuse_step() -> tuple[Tensor, dict[str, list[Any]]]:
    """(output, targets of the lowered nodes by variant)."""
    run, out = small_run()
    variants = only_entry(run).variants
    graphs = {v: variants.lowered(v)[0].graph for v in ("refresh", "reuse")}
    return out, {v: [n.target for n in graph.nodes] for v, graph in graphs.items()}
