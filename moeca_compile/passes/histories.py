"""Whole values kept from refresh to refresh, and what is extrapolated from them.

    refresh    h.1 <- h.0 ; h.0 <- value        for every attention, experts' and model's output
    forecast   value = sum_j w_j h.j            w: float32 [depth], an input of the graph
    skip       output = sum_j c_j o.j + e x + sum_j e_j x.j

Unlike row caches nothing is selected here: FORA, TaylorSeer and output forecasts
(policies/) are the cases in which a layer, or the model, is one row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.region import Regions
from ..graph.retrace import AtenGraph
from ..policies.protocol import Stored
from ..runtime.inputs import find_roles
from ..runtime.store import CacheSpec

moeca = torch.ops.moeca


@dataclass(frozen=True)
class History:
    """The value of `node` at the last `depth` refreshes, newest first."""

    name: str
    node: Node
    depth: int
    kind: str

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the cache tensors, newest first."""
        return tuple(f"{self.name}.{j}" for j in range(self.depth))

    @property
    def specs(self) -> list[CacheSpec]:
        value = self.node.meta["val"]
        shape, device = tuple(value.shape), value.device
        # Oldest first: Inductor writes mutated inputs back in their order, after everything else,
        # and `older <- newer` has to come before `newer <- value`.
        fields = reversed(self.fields)
        return [CacheSpec(name, shape, value.dtype, device, self.kind) for name in fields]

    def push(self, caches: dict[str, Tensor], value: Tensor) -> None:
        """Store `value` as the newest one."""
        for newer, older in reversed(list(zip(self.fields, self.fields[1:]))):
            moeca.cache_fill(caches[older], caches[newer])
        moeca.cache_fill(caches[self.fields[0]], value)

    def weighted(self, caches: dict[str, Tensor], weights: Tensor) -> Tensor:
        """Sum of the stored values, float32; what has weight 0 is not looked at, NaN or not."""
        total: Tensor | None = None
        for name, weight in zip(self.fields, weights.unbind()):
            term = torch.where(weight != 0, caches[name].float() * weight, 0.0)
            total = term if total is None else total + term
        assert total is not None
        return total


@dataclass(frozen=True)
class Histories:
    """All that a lane keeps whole. layers: outputs of attention and experts. outputs: of the model.
    sample: where the first output has its shape. input: of the first attention, last step's.
    refused: why the model's outputs cannot be forecast, "" where they can or nobody asked."""

    layers: tuple[History, ...] = ()
    outputs: tuple[History, ...] = ()
    sample: History | None = None
    input: History | None = None
    refused: str = ""

    @property
    def specs(self) -> list[CacheSpec]:
        rest = tuple(h for h in (self.sample, self.input) if h is not None)
        return [spec for h in (*self.layers, *self.outputs, *rest) for spec in h.specs]

    def coefficients(self, variant: str) -> int:
        """How many numbers the policy mixes stored values by in a variant."""
        depth = self.outputs[0].depth if self.outputs else 0
        if variant == "forecast":
            return self.layers[0].depth if self.layers else 0
        return {"skip": 2 * depth + 1, "refresh": depth + 1}.get(variant, 0) if depth else 0

    @property
    def basis(self) -> int:
        """Vectors whose inner products a refresh returns; see `gram`."""
        if not self.outputs:
            return 0
        depth = self.outputs[0].depth
        return 1 + depth + (depth if self.sample else 0)


def plan_histories(regions: Regions, aten: AtenGraph, stored: Stored) -> Histories:
    """What the policy asks for, as far as the graph has it."""
    layers = tuple(
        History(f"layer.{name}", node, stored.layers, "layer")
        for name, node in _layer_outputs(regions)
        if stored.layers
    )
    first = regions.attention[0].input.node if stored.input and regions.attention else None
    entry = History("first_input", first, 1, "layer") if first is not None else None
    if not stored.outputs:
        return Histories(layers, input=entry)
    outputs, refused = _outputs(aten)
    if refused:
        return Histories(layers, input=entry, refused=refused)
    kept = tuple(History(f"output{i}", n, stored.outputs, "output") for i, n in enumerate(outputs))
    return Histories(layers, kept, _sample(aten, outputs[0], stored.outputs), entry)


def _layer_outputs(regions: Regions) -> list[tuple[str, Node]]:
    found: dict[Node, str] = {a.root.node: a.name for a in regions.attention}
    for region in regions.moe:
        found[region.combine] = region.name
        for i, shared in enumerate(region.shared):
            found[shared.node] = f"{region.name}.shared{i}"
    return [(f"{i}.{name}", node) for i, (node, name) in enumerate(found.items())]


def _outputs(aten: AtenGraph) -> tuple[list[Node], str]:
    values = list(aten.gm.graph.output_node().args[0])  # type: ignore[arg-type]
    for i, node in enumerate(values):
        value = node.meta.get("val") if isinstance(node, Node) else node
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return [], f"output {i} is {value if not isinstance(value, Tensor) else value.dtype}"
    return [n for n in values if isinstance(n, Node)], "" if values else "the graph has no output"


def _sample(aten: AtenGraph, output: Node, depth: int) -> History | None:
    position = find_roles(aten, None).sample
    if position is None:
        return None
    hole = aten.placeholders[position]
    if hole.meta["val"].shape != output.meta["val"].shape:
        return None  # learned variance: the output has more channels
    return History("sample", hole, depth, "output")


def gram(
    histories: Histories, caches: dict[str, Tensor], output: Tensor, sample: Tensor | None
) -> Tensor:
    """Inner products [basis * basis], float32, of new - o_0, o_0, o_0 - o_1, ..., and, with a
    sample, x - x_0, x_0 - x_1, ...: what policies/predictors.py judges forecasts by."""
    first = histories.outputs[0]
    old = [caches[name].float() for name in first.fields]
    rows = [output.float() - old[0], old[0], *(a - b for a, b in zip(old, old[1:]))]
    if histories.sample is not None:
        assert sample is not None
        moved = [sample.float(), *(caches[n].float() for n in histories.sample.fields)]
        rows += [a - b for a, b in zip(moved, moved[1:])]
    flat = torch.stack([row.reshape(-1) for row in rows])
    # no matmul: TensorFloat32 would round the errors away
    return (flat.unsqueeze(0) * flat.unsqueeze(1)).sum(-1).reshape(-1)
