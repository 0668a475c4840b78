"""What both orders of a reuse step share: guard, rows, branches, combine, slot state.

    guard_branches            -> computed [T, K] in slot order
    rows of a region's root   -> cache_write of the selected rows; the root becomes cache_read
    combine                   -> as written, all slots of the cache with current weights

Semantics: method step by step in `tests/reference.py`, which judges this file in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.traceback import set_current_meta

from ..graph.dataflow import ancestors, descendants
from ..graph.evaluate import Evaluator
from ..graph.experts import SortedRows, sort_branches
from ..graph.layout import Selection
from ..graph.pull import RowPuller
from ..graph.region import StreamPart
from ..graph.row_cache import RowCache, padded_index
from ..graph.streams import WholeRows
from ..options import Options
from ..runtime.telemetry import FIELDS
from .cache_plan import LayerPlan
from .reuse_inputs import MIN_ROWS, ReuseInputs
from .run_experts import run_experts

moeca = torch.ops.moeca


@dataclass(frozen=True)
class TokenRows:
    """Selected token rows, where to write them (padding goes behind the last row), and the mask."""

    selection: Selection
    write_index: Tensor
    mask: Tensor  # [T] bool

    @property
    def run(self) -> Any:
        """Rows computed, padding included."""
        return self.selection.count * self.selection.space.samples


class ReuseLayer(ABC):
    """Builds one MoE layer of the reuse variant under tracing."""

    def __init__(
        self,
        evaluator: Evaluator,
        layer: LayerPlan,
        options: Options,
        inputs: ReuseInputs,
        needed: frozenset[Node],
    ):
        self.evaluator = evaluator
        self.layer = layer
        self.region = layer.region
        self.options = options
        self.inputs = inputs
        self._outside = needed - layer.roots
        self._counts: dict[str, Any] = {}
        self.drifted: Tensor | None = None  # [T, K], of branches' inputs, once the guard has run

    @abstractmethod
    def install(self) -> None:
        """Replace the region's roots; what is needed first builds what it depends on."""

    def counters(self) -> Tensor:
        """int64 [fields], in the order of telemetry.FIELDS, counted from what ran."""
        zero = torch.zeros((), dtype=torch.int64, device=self.computed.device)
        return torch.stack([zero + self._counts.get(name, 0) for name in FIELDS])

    @property
    def reads_sizes(self) -> bool:
        """Whether the host may read how many rows were chosen: free on a CPU. A GPU would be waited
        for; there a step under a budget computes as many as it might have to."""
        return self.computed.device.type == "cpu"

    # -- caches ----------------------------------------------------------------------------------

    def cache(self, field: str) -> Tensor:
        return self.inputs.caches[self.layer.name(field)]

    def read(self, cache: RowCache) -> Tensor:
        rows = self.inputs.rows.read(cache.name, cache.times, self.layer.tokens)
        return cache.from_rows(rows)

    def refresh_rows(self, caches: tuple[RowCache, ...], rows: TokenRows) -> list[Tensor]:
        """Recompute the selected rows of each root in turn; its value is then its whole cache.

        Returns the new rows of each cache, [R, width].
        """
        if not caches:
            return []
        puller = RowPuller(rows.selection, self.evaluator.value, self._outside.__contains__)
        before = self.inputs.rows.stamp(caches[-1].times, rows.write_index)
        made = []
        for cache in caches:
            root = cache.root
            with set_current_meta(root.node):
                fresh = cache.to_rows(puller.pull(root.node, root.layout), rows.selection)
                earlier = before if cache.times else None
                self.inputs.rows.write(cache.name, rows.write_index, fresh, earlier)
                self.evaluator.set(root.node, self.read(cache))
            made.append(fresh)
        return made

    def put_off_other_streams(self) -> None:
        """Rows of other streams from the same attention come after the cached keys and values."""
        for attention in self.layer.attention:
            root = attention.root.root.node
            for part in attention.region.beside:
                self.evaluator.replace(part.node, partial(self._compute_part, root, part))

    def _compute_part(self, root: Node, part: StreamPart) -> None:
        self.evaluator.value(root)
        with set_current_meta(part.node):
            rows = WholeRows(part, self.evaluator.value).rows()
            self.evaluator.set(part.node, rows.reshape(part.node.meta["val"].shape))

    def drift(self, name: str, now: Tensor) -> Tensor:
        """Relative change [T] of rows `now [T, W]` since the token's row in cache `name`."""
        cache = self.inputs.caches[name]
        then = moeca.cache_read(cache, self.layer.tokens).float()
        now = now.to(cache.dtype).float()  # what rounding took from the cached row is no drift
        return (now - then).norm(dim=-1) / then.norm(dim=-1).clamp(min=1e-12)

    def input_drift(self, rows: list[Tensor]) -> Tensor | None:
        """Drift [T] of the expert inputs, summed where they take several; None: not scored."""
        return self.summed_drift("token_in", rows) if self.layer.tracks_drift else None

    def summed_drift(self, field: str, rows: list[Tensor]) -> Tensor:
        """Drift [T] against the caches `field`0, `field`1, ..., summed."""
        names = [self.layer.name(f"{field}{i}") for i in range(len(rows))]
        return torch.stack([self.drift(n, r) for n, r in zip(names, rows)]).sum(0)

    # -- routing ---------------------------------------------------------------------------------

    def guard(self, routing: tuple[Tensor, ...], input_drift: Tensor | None) -> None:
        """Decide the branches to compute; results stay on the object, [T, K] in slot order.

        routing: values of the region's `routing`.
        """
        options, shape = self.options, (self.layer.tokens, self.region.top_k)
        selector = self.layer.selector
        ids, weights = routing[0].reshape(shape), routing[1]
        alpha = options.alpha if selector.expert_aware else 0.0
        spatial, limits = moeca.expert_thresholds(
            self.cache("spatial"), ids, options.tau, alpha, options.beta
        )
        moeca.cache_fill(self.cache("spatial"), spatial)
        slot_weight = self.cache("slot_weight")
        slot_norm = moeca.cache_read(self.cache("slot_norm"), self.layer.branches)
        if input_drift is not None:
            self.drifted = input_drift.unsqueeze(1) + self.cache("slot_drift")
        evidence = self.drifted if selector.tracks_drift else None
        if selector.token_score is not None:
            evidence = selector.token_score(self).unsqueeze(1).expand(shape)
        if evidence is None:
            evidence = torch.zeros_like(slot_weight)
        self.computed, self.now, self.slot_weights, self.share, self.matched = moeca.guard_branches(
            ids,
            weights.reshape(shape),
            self.cache("slot_ids"),
            slot_weight,
            slot_norm.reshape(shape),
            evidence,
            limits,
            self.region.space.samples,
            self.budget(self.inputs.branches, self.layer.branches),
            selector.formula,
            options.lambda_drift,
            options.lambda_share,
        )

    def tokens_computed(self) -> Tensor:
        """[T]: tokens with any computed branch."""
        return self.computed.any(1)

    def budget(self, count: Tensor | int | None, rows: int, groups: int | None = None) -> Any:
        """A count per sample, or group, as a size, at most its rows; known only at run time where
        it comes as a tensor."""
        if count is None:
            return None
        size: Any = count if isinstance(count, int) else count.item()
        torch._check(size >= MIN_ROWS)
        torch._check(size <= rows // (groups or self.region.space.samples))
        return size

    def rows_of(self, token: Tensor, valid: Tensor, mask: Tensor, count: Any) -> TokenRows:
        """Rows of `token [B, n]` (index within the sample); those not `valid` are padding."""
        space = self.region.space
        base = torch.arange(space.samples, device=token.device).unsqueeze(1) * space.tokens
        selection = Selection(space, (base + token).reshape(-1), count, per_sample=True)
        return TokenRows(selection, padded_index(selection, valid), mask.reshape(-1))

    # -- branches --------------------------------------------------------------------------------

    def compute_branches(self, rows: list[Tensor], input_drift: Tensor | None) -> None:
        """Run the selected experts on their rows, store outputs, norms and the tokens' inputs."""
        region, flat = self.region, self.computed.reshape(-1)
        count = self.budget(self.inputs.branches, self.layer.branches)
        if count is None:
            count = flat.sum().clamp(min=MIN_ROWS).item()
            torch._check(count >= MIN_ROWS)
            torch._check(count <= self.layer.branches)
        else:
            count = count * region.space.samples
        order, groups = sort_branches(self.now.reshape(-1), region.num_experts, flat)
        branch = order.narrow(0, 0, count)
        groups = SortedRows(groups.ends, groups.experts.narrow(0, 0, count))
        token = torch.div(branch, region.top_k, rounding_mode="floor")
        out = run_experts(self.evaluator, region, rows, token, groups, self.expected_branches)
        valid = flat[branch]
        index = torch.where(valid, branch, self.layer.branches)
        before = self.inputs.rows.stamp(self.layer.slot_times, index)
        same = self.matched.reshape(-1)[branch]
        self.inputs.rows.write(self.layer.name("slot_out"), index, out, before, same)
        moeca.cache_write(self.cache("slot_norm"), index, out.float().norm(dim=-1))
        self._update_slots(input_drift)
        if input_drift is not None:
            # A token with two computed branches is written twice, with the same row.
            written = torch.where(valid, token, self.layer.tokens)
            for i, r in enumerate(rows):
                moeca.cache_write(self.cache(f"token_in{i}"), written, r.index_select(0, token))

    @property
    def expected_branches(self) -> float:
        """How many branches will be computed; without a budget the data says, at most all."""
        return self.layer.branches * (1.0 if self.options.budget is None else self.options.budget)

    def _update_slots(self, input_drift: Tensor | None) -> None:
        """Ids, weights and drift of all tokens with a computed branch, written together."""
        moved = self.computed.any(1, keepdim=True)
        slot_ids, slot_weight = self.cache("slot_ids"), self.cache("slot_weight")
        moeca.cache_fill(slot_weight, torch.where(moved, self.share, slot_weight))
        moeca.cache_fill(slot_ids, torch.where(self.computed, self.now, slot_ids))
        self.count_ages(moved.squeeze(1))
        if input_drift is not None:
            older = self.cache("slot_drift") + input_drift.unsqueeze(1) * moved
            moeca.cache_fill(self.cache("slot_drift"), torch.where(self.computed, 0.0, older))

    def count_ages(self, moved: Tensor) -> None:
        """One more step for the tokens not in `moved [T]`, where anyone asks."""
        if self.layer.selector.counts_age:
            ages = self.cache("token_age")
            moeca.cache_fill(ages, torch.where(moved, 0.0, ages + 1))

    def combine(self) -> None:
        """The combine as written, on slot order: it sums over the slots, their order is free."""
        region = self.region
        slots = self.inputs.rows.read(
            self.layer.name("slot_out"), self.layer.slot_times, self.layer.branches
        ).to(region.routed.meta["val"].dtype)
        changed = {
            region.routed: slots.reshape(*self.computed.shape, -1),
            region.weights: self.slot_weights.reshape(region.weights.meta["val"].shape),
        }
        below = ancestors([region.combine], stop=set(changed)) & (
            descendants(region.routed) | descendants(region.weights)
        )
        self.evaluator.set(region.combine, self.evaluator.view(changed, below)(region.combine))

    def counted_branches(self) -> dict[str, Tensor]:
        """Counts of what the guard decided."""
        return {
            "branches_computed": self.computed.sum(),
            "unmatched": (~self.matched).sum(),
            "dropped": (~self.matched & ~self.computed).sum(),
        }

    def count(self, attended: TokenRows | None, shared: TokenRows | None) -> None:
        """Note what ran; None where the layer has no such part."""
        self._counts = dict(self.counted_branches())
        if attended is not None and self.layer.attention:
            self._counts["tokens_attended"] = attended.mask.sum()
            self._counts["attention_run"] = attended.run
        if shared is not None and self.layer.shared:
            self._counts["shared_rows"] = shared.mask.sum()
            self._counts["shared_run"] = shared.run
