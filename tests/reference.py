"""The method in plain eager float64: the judge of every compiled variant.

Slow on purpose: every step computes everything and then lets only the selected rows through, so the
arithmetic of a selected row is the arithmetic of the model and nothing is indexed cleverly.

    ref = Reference(model, options)
    first = ref.step(x, t, y, refresh=True)                    # first.output, first.layers[i].pairs
    later = ref.step(x, t, y, refresh=False)                   # the reference's own selection
    later = ref.step(x, t, y, refresh=False, forced=[pairs..])  # a compiled run's selection instead
    assert later.disputed == [set()] * depth                    # and it was a legal one

B samples, N tokens each, T = B * N in sample-major order, K slots, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from reference_layer import refresh_layer, reuse_attention_first, reuse_router_first
from reference_options import MethodOptions, ReferenceOptions
from reference_state import Forced, LayerCall, LayerState, Pairs, ReferenceLayer
from reference_views import View, view_of

__all__ = ["Forced", "Reference", "ReferenceOptions", "ReferenceStep"]


@dataclass
class ReferenceStep:
    """Output of the model, and what each layer did."""

    output: Tensor
    layers: list[ReferenceLayer]

    @property
    def disputed(self) -> list[Pairs]:
        """Per layer: forced branches the reference would not choose, and the other way round."""
        return [layer.disputed for layer in self.layers]


@dataclass
class Lane:
    """State of one lane: per layer the cached rows, and the usage statistic C [E, N]."""

    layers: dict[int, LayerState] = field(default_factory=dict)
    usage: dict[int, Tensor] = field(default_factory=dict)


class Reference:
    """Float64 copy of a model, run step by step with the rules of the method.

    tolerance: how close to the edge of its selection rule a branch counts as a near tie. uncached:
    numbers of the layers that are computed in full at every step. view: how to take it apart.
    Raises TypeError for a model of unknown layout.
    """

    def __init__(
        self,
        model: nn.Module,
        options: MethodOptions | None = None,
        tolerance: float = 1e-6,
        uncached: Sequence[int] = (),
        view: View = view_of,
    ) -> None:
        self.uncached = frozenset(uncached)
        self.options: MethodOptions = ReferenceOptions() if options is None else options
        self.tolerance = tolerance
        self.view = view(copy.deepcopy(model).double())
        self.lanes: dict[object, Lane] = {}

    def reset(self) -> None:
        """Forget everything: a new generation."""
        self.lanes.clear()

    @torch.no_grad()
    def step(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        refresh: bool,
        *,
        lane: object = None,
        forced: Sequence[Pairs | Forced] | None = None,
    ) -> ReferenceStep:
        """One call of the denoiser; `forced` gives one selection per layer, on reuse steps only.

        Raises ValueError when a lane starts with a reuse step, or a refresh is forced.
        """
        state = self.lanes.setdefault(lane, Lane())
        if not refresh and not state.layers:
            raise ValueError("the first step of a lane must be a refresh")
        if refresh and forced is not None:
            raise ValueError("a refresh computes everything; nothing can be forced")
        h, c = self.view.embed(x.to(torch.float64), t, y)
        layers: list[ReferenceLayer] = []
        for index, block in enumerate(self.view.blocks):
            call = LayerCall(
                block=block,
                x=h,
                c=c,
                options=self.options,
                tolerance=self.tolerance,
                usage=state.usage.get(index, h.new_zeros(block.num_experts, h.shape[1])),
                forced=None if forced is None else _as_forced(forced[index]),
                now=float(t.flatten()[0]),
            )
            if refresh or index in self.uncached:
                h, layer = refresh_layer(call, state.layers.get(index))
            elif self.options.order == "attention_first":
                h, layer = reuse_attention_first(call, state.layers[index])
            else:
                h, layer = reuse_router_first(call, state.layers[index])
            state.layers[index], state.usage[index] = layer.state, layer.usage
            layers.append(layer)
        return ReferenceStep(self.view.finish(h, c), layers)


def _as_forced(selection: Pairs | Forced) -> Forced:
    return selection if isinstance(selection, Forced) else Forced(set(selection))
