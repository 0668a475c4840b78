"""The paper's order: the router sees cached attention, then the chosen tokens are attended.

stale stream -> ids, w, guard -> tokens S -> K, V, attention rows of S -> stream with them
-> expert inputs -> selected branches, shared rows of S -> combine with the weights above
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.traceback import set_current_meta

from ..graph.dataflow import ancestors, descendants
from .reuse_inputs import MIN_ROWS
from .reuse_layer import ReuseLayer, TokenRows


class RouterFirst(ReuseLayer):
    """One selection of tokens per layer: those with a computed branch."""

    def install(self) -> None:
        self.put_off_other_streams()
        for attention in self.layer.attention:
            self.evaluator.replace(attention.root.root.node, self._route)
        for node in self.region.routing:
            self.evaluator.replace(node, self._route)
        self.evaluator.replace(self.region.combine, self._experts)

    def _route(self) -> None:
        # From here on these are nodes like any other, on the cached attention.
        for node in self.region.routing:
            self.evaluator.restore(node)
        with set_current_meta(self.region.routed):
            stale = self._stale_view()
            routing = tuple(stale(n) for n in self.region.routing)
            rows = [stale(r).reshape(self.layer.tokens, -1) for r in self.region.rows]
            self.guard(routing, self.input_drift(rows))
            self.rows = self._select(self.tokens_computed())
        for attention in self.layer.attention:
            self.refresh_rows((*attention.key_value, attention.root), self.rows)
        for node, value in zip(self.region.routing, routing, strict=True):
            self.evaluator.set(node, value)

    def _stale_view(self) -> Callable[[Any], Any]:
        """The graph with attention as cached, read before anything is written in this step.

        What comes from earlier layers is evaluated before it, so that the first and the last layer
        look like all others and are compiled once with them (graph/repeats.py).
        """
        roots = {a.root.root.node: a.root for a in self.layer.attention}
        below: set[Node] = set()
        for root in roots:
            below |= descendants(root)
        wanted = [*self.region.routing, *self.region.rows]
        below = (below & ancestors(wanted, stop=set(roots))) - roots.keys()
        given = {n for node in below for n in node.all_input_nodes} - below - roots.keys()
        for node in self.evaluator.gm.graph.nodes:
            if node in given:
                self.evaluator.value(node)
        changed = {node: self.read(cache) for node, cache in roots.items()}
        return self.evaluator.view(changed, below)

    def _select(self, mask: Tensor) -> TokenRows:
        """The tokens in `mask [T]`, padded per sample to as many as the fullest sample has; or,
        where that is not known on the host, as it could have."""
        space = self.region.space
        chosen = mask.reshape(space.samples, space.tokens)
        count: Any = None if self.reads_sizes else self.budget(self.inputs.touched, mask.shape[0])
        if count is None:
            count = chosen.sum(1).amax().clamp(min=MIN_ROWS).item()
            torch._check(count >= MIN_ROWS)
            torch._check(count <= space.tokens)
        valid, token = chosen.to(torch.float32).topk(count, 1)
        return self.rows_of(token, valid > 0, mask, count)

    def _experts(self) -> None:
        with set_current_meta(self.region.routed):
            self.evaluator.value(self.region.weights)  # routes, if nothing has asked for it yet
            rows = [
                self.evaluator.value(r).reshape(self.layer.tokens, -1) for r in self.region.rows
            ]
            self.compute_branches(rows, self.input_drift(rows))
            self.refresh_rows(self.layer.shared, self.rows)
            self.count(self.rows, self.rows)
            self.combine()
