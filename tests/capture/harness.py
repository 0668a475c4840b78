"""A test backend that counts graphs and runs them as they are, with and without capture."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from moeca_compile.capture import RootRegistry, wrap_fragment


@dataclass
class Counter:
    """Graphs handed to a backend, in order."""

    graphs: list[GraphModule] = field(default_factory=list)
    registry: RootRegistry = field(default_factory=RootRegistry)

    def __len__(self) -> int:
        return len(self.graphs)


def capturing() -> tuple[Counter, Callable[..., Any]]:
    """A backend that takes part in capture."""
    counter = Counter()

    def backend(gm: GraphModule, example_inputs: list[Any], **_: Any) -> Callable[..., Any]:
        counter.graphs.append(gm)
        return wrap_fragment(gm.forward, counter.registry)

    backend._moeca_backend = True  # type: ignore[attr-defined]
    return counter, backend


def plain() -> tuple[Counter, Callable[..., Any]]:
    """A backend that knows nothing of capture."""
    counter = Counter()

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        counter.graphs.append(gm)
        return gm.forward

    return counter, backend


def run_steps(
    compiled: Callable[..., Tensor], counter: Counter, steps: list[tuple[Tensor, ...]]
) -> tuple[list[Tensor], list[int]]:
    """Outputs, and how many graphs each step added."""
    outputs, added = [], []
    for step in steps:
        before = len(counter)
        outputs.append(compiled(*step))
        added.append(len(counter) - before)
    return outputs, added


def reference(model: nn.Module, steps: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """What the model gives eagerly."""
    return [model(*step) for step in steps]


def assert_equal(found: list[Tensor], expected: list[Tensor], atol: float = 2e-6) -> None:
    """Equal within float32 rounding of sums in another order (outputs are of scale 1 to 10)."""
    for one, two in zip(found, expected):
        torch.testing.assert_close(one, two, rtol=2e-6, atol=atol)


def op_counts(graph: GraphModule) -> dict[str, int]:
    """How often each marker op occurs."""
    names = [str(n.target) for n in graph.graph.nodes if n.op.startswith("call_")]
    return {
        op: sum(op in name for name in names) for op in ("expert_rows", "select_experts", "topk")
    }


def wrapped_like_accelerate(module: nn.Module) -> None:
    """Shadow `module.forward` on the instance the way offloading libraries do."""
    original = module.forward

    def forward(owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return owner._old_forward(*args, **kwargs)

    module._old_forward = original  # type: ignore[assignment]
    module.forward = functools.update_wrapper(functools.partial(forward, module), original)
