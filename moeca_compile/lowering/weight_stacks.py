"""Weights of separate expert modules stacked once for a generation, not at every step.

    before   w = stack([w_0, .., w_E])                in the graph: all of them through memory
    after    placeholder `stacked_0` [E, O, I]        behind the variant's other inputs
    stacks.values(variant, inputs) -> [stacked_0, ..] kept on the device, one set for all variants

A grouped product wants the weights of all experts as one tensor; modules hold one each. On a GPU a
step that computes a tenth of the rows would spend a quarter of its time on copying weights. What is
kept is a second copy of these weights: only where it fits in half of the memory that is free, else
they are stacked as before. `renew` writes current weights to the same addresses; the caller does so
for each generation and whenever weights changed, so an edit that leaves no trace lasts no longer
here than in cached rows.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

log = logging.getLogger(__name__)
aten = torch.ops.aten
Recipe = tuple[int, ...]  # positions of the weights among a variant's inputs


class WeightStacks:
    """The stacks of one analysed graph, whose weights have the same positions in all variants."""

    def __init__(self) -> None:
        self._recipes: dict[str, list[Recipe]] = {}
        self._tensors: dict[Recipe, Tensor] = {}
        self._planned: set[Recipe] = set()

    def __bool__(self) -> bool:
        return bool(self._tensors)

    @property
    def nbytes(self) -> int:
        """Bytes kept now."""
        return sum(t.nbytes for t in self._tensors.values())

    def hoist(self, variant: str, gm: GraphModule, weights: Collection[int]) -> list[Tensor]:
        """Make stacks of `weights` (positions of inputs) inputs of the graph, which is changed.

        Returns their fake values, in the order in which `values` gives them; none where the device
        has no room.
        """
        holes = gm.graph.find_nodes(op="placeholder")
        at = {node: i for i, node in enumerate(holes) if i in weights}
        found: dict[Recipe, list[Node]] = {}
        for node in gm.graph.find_nodes(op="call_function", target=aten.stack.default):
            recipe = _recipe(node, at)
            if recipe is not None:
                found.setdefault(recipe, []).append(node)
        new = [nodes[0].meta["val"] for r, nodes in found.items() if r not in self._planned]
        if not found or not _fits(new):
            return []
        self._planned |= found.keys()
        self._recipes[variant] = list(found)
        last = holes[-1]
        for number, nodes in enumerate(found.values()):
            with gm.graph.inserting_after(last):
                last = gm.graph.placeholder(f"stacked_{number}")
            last.meta["val"] = nodes[0].meta["val"]
            for node in nodes:
                node.replace_all_uses_with(last)
                gm.graph.erase_node(node)
        gm.recompile()
        return [nodes[0].meta["val"] for nodes in found.values()]

    def values(self, variant: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What the variant takes behind its other inputs; inputs: the variant's own."""
        return [self._value(recipe, inputs) for recipe in self._recipes.get(variant, ())]

    def renew(self, inputs: Sequence[Tensor]) -> None:
        """Stack the weights of this call again, to the same addresses."""
        with torch.inference_mode(False), torch.no_grad():
            for recipe, kept in self._tensors.items():
                torch.stack([inputs[i] for i in recipe], out=kept)

    def release(self) -> None:
        """Free them; the next call makes them anew."""
        self._tensors.clear()

    def _value(self, recipe: Recipe, inputs: Sequence[Tensor]) -> Tensor:
        kept = self._tensors.get(recipe)
        if kept is None:
            # An inference tensor could not be written to outside of inference mode.
            with torch.inference_mode(False), torch.no_grad():
                kept = torch.stack([inputs[i] for i in recipe])
            self._tensors[recipe] = kept
        return kept


def _recipe(node: Node, at: dict[Node, int]) -> Recipe | None:
    """Where a stack's weights come from; None if it is of anything else, or along another dim."""
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if dim != 0 or not isinstance(parts, (list, tuple)):
        return None
    if not all(isinstance(p, Node) and p in at for p in parts):
        return None
    return tuple(at[p] for p in parts)  # type: ignore[index]


def _fits(new: Sequence[Tensor]) -> bool:
    """Whether the device has twice the bytes of these tensors free."""
    on_gpu = [t for t in new if t.device.type == "cuda"]
    if not on_gpu or not torch.cuda.is_available():
        return True
    needed = sum(t.numel() * t.element_size() for t in on_gpu)
    free, _ = torch.cuda.mem_get_info(on_gpu[0].device)
    told = f"{needed / 2**20:.0f} MiB of stacked expert weights, {free / 2**20:.0f} MiB are free"
    if 2 * needed > free:
        log.info("not kept: %s; they are stacked in every step", told)
        return False
    log.info("kept: %s", told)
    return True
