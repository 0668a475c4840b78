"""The report a user reads: `print(moeca_compile.stats(compiled))`.

Stats.branches_computed / Stats.branches_total   how much of the routed experts really ran
Stats.speedup_flops = flops_full / flops_computed
str(stats)                                       totals, refresh reasons, a table per layer
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate


@dataclass(frozen=True)
class LayerCost:
    """Arithmetic of one MoE layer and the attention synchronised with it, per step and entry.

    branch_flops: one expert on one token. token_flops: q, k, v, attention and projection of one
    token. shared_flops: shared expert of one token, 0 without. tokens: B * N. branches: B * N * K.
    open_ended: how many branches there are depends on the data, `branches` at most.
    """

    name: str
    branch_flops: float
    token_flops: float
    shared_flops: float
    tokens: int
    branches: int
    open_ended: bool = False

    @property
    def shared_rows(self) -> int:
        """Rows of the shared expert in a full step; 0 without one."""
        return self.tokens if self.shared_flops else 0

    @property
    def full_flops(self) -> float:
        """FLOPs of a step that computes every row."""
        per_token = self.token_flops + self.shared_flops
        return self.branches * self.branch_flops + self.tokens * per_token


@dataclass(frozen=True)
class Costs:
    """FLOPs of a graph. fixed: outside the layers' rows. forecast: all of a forecast step."""

    layers: tuple[LayerCost, ...]
    fixed: float = 0.0
    forecast: float = 0.0


@dataclass(frozen=True)
class LayerStats:
    """One layer's totals over all steps. `unmatched` and `dropped` occur on reuse steps only."""

    name: str
    branches_total: int
    branches_computed: int
    tokens_total: int
    tokens_attended: int
    shared_rows: int
    unmatched: int
    dropped: int
    flops_full: float
    flops_computed: float


@dataclass(frozen=True)
class Stats:
    """Totals since the last reset. Frozen; counted from what ran.

    fixed_flops: spent outside the layers' rows; fixed_flops_full: what that costs without caching.
    cache_bytes: held now. left_out: layers not cached for want of bytes (max_cache_bytes). reasons:
    why refresh steps were refreshes. events: notable happenings, oldest first.
    """

    plain_steps: int = 0
    refresh_steps: int = 0
    reuse_steps: int = 0
    forecast_steps: int = 0
    skip_steps: int = 0
    layers: tuple[LayerStats, ...] = ()
    fixed_flops: float = 0.0
    fixed_flops_full: float = 0.0
    cache_bytes: int = 0
    generations: int = 0
    lanes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    events: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Calls of the denoiser, of every kind."""
        computed = self.plain_steps + self.refresh_steps + self.reuse_steps
        return computed + self.forecast_steps + self.skip_steps

    @property
    def branches_total(self) -> int:
        """(token, expert) pairs the router asked for."""
        return sum(layer.branches_total for layer in self.layers)

    @property
    def branches_computed(self) -> int:
        """(token, expert) pairs an expert really ran on."""
        return sum(layer.branches_computed for layer in self.layers)

    @property
    def tokens_total(self) -> int:
        """Attention rows a model without caching computes."""
        return sum(layer.tokens_total for layer in self.layers)

    @property
    def tokens_attended(self) -> int:
        """Attention rows really computed."""
        return sum(layer.tokens_attended for layer in self.layers)

    @property
    def unmatched(self) -> int:
        """Branches of reuse steps whose expert was not cached for the token."""
        return sum(layer.unmatched for layer in self.layers)

    @property
    def dropped(self) -> int:
        """Unmatched branches beyond the budget, which contributed nothing."""
        return sum(layer.dropped for layer in self.layers)

    @property
    def flops_full(self) -> float:
        """What the same steps cost without caching."""
        return self.fixed_flops_full + sum(layer.flops_full for layer in self.layers)

    @property
    def flops_computed(self) -> float:
        """What was really spent."""
        return self.fixed_flops + sum(layer.flops_computed for layer in self.layers)

    @property
    def speedup_flops(self) -> float:
        """flops_full / flops_computed; 1.0 before the first step."""
        return self.flops_full / self.flops_computed if self.flops_computed else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Every field and every total by name, JSON-serialisable."""
        fields = {
            **asdict(self),
            "reasons": dict(self.reasons),
            "layers": [asdict(layer) for layer in self.layers],
            "events": list(self.events),
            "left_out": list(self.left_out),
        }
        return {**fields, **{name: getattr(self, name) for name in _TOTALS}}

    def _kinds(self) -> str:
        counted = {kind: getattr(self, f"{kind}_steps") for kind in _KINDS}
        return ", ".join(f"{kind} {n}" for kind, n in counted.items() if n) or "none"

    def __str__(self) -> str:
        head = [
            f"steps {self.steps}: {self._kinds()}; generations {self.generations}, "
            f"lanes {self.lanes}",
            f"branches computed {_share(self.branches_computed, self.branches_total)}, "
            f"tokens attended {_share(self.tokens_attended, self.tokens_total)}, "
            f"FLOPs / {self.speedup_flops:.2f}, cache {self.cache_bytes / 2**20:.1f} MiB",
        ]
        if self.reasons:
            reasons = ", ".join(f"{name} {n}" for name, n in self.reasons.most_common())
            head.append(f"refreshed because: {reasons}")
        if self.left_out:
            head.append(f"not cached, max_cache_bytes: {', '.join(self.left_out)}")
        table = tabulate([_row(layer) for layer in self.layers], headers="keys")
        return "\n".join([*head, table, *self.events]).rstrip()


_KINDS = ("refresh", "reuse", "forecast", "skip", "plain")
_TOTALS = tuple(name for name, value in vars(Stats).items() if isinstance(value, property))


def merge_stats(parts: Sequence[Stats]) -> Stats:
    """Totals over the entries of one compiled model (one entry per input shape); layers by name."""
    layers: dict[str, LayerStats] = {}
    for layer in (layer for part in parts for layer in part.layers):
        known = layers.get(layer.name)
        layers[layer.name] = layer if known is None else _sum_layers(known, layer)
    return Stats(
        plain_steps=sum(part.plain_steps for part in parts),
        refresh_steps=sum(part.refresh_steps for part in parts),
        reuse_steps=sum(part.reuse_steps for part in parts),
        forecast_steps=sum(part.forecast_steps for part in parts),
        skip_steps=sum(part.skip_steps for part in parts),
        layers=tuple(layers.values()),
        fixed_flops=sum(part.fixed_flops for part in parts),
        fixed_flops_full=sum(part.fixed_flops_full for part in parts),
        cache_bytes=sum(part.cache_bytes for part in parts),
        generations=sum(part.generations for part in parts),
        lanes=sum(part.lanes for part in parts),
        reasons=sum((part.reasons for part in parts), Counter()),
        events=tuple(event for part in parts for event in part.events),
        left_out=tuple(dict.fromkeys(name for part in parts for name in part.left_out)),
    )


def _sum_layers(left: LayerStats, right: LayerStats) -> LayerStats:
    both = asdict(right)
    return LayerStats(**{k: v if k == "name" else v + both[k] for k, v in asdict(left).items()})


def _share(part: int, whole: int) -> str:
    return f"{part}/{whole} ({100 * part / whole:.1f} %)" if whole else "0/0"


def _row(layer: LayerStats) -> dict[str, Any]:
    return {
        "layer": layer.name,
        "branches computed": _share(layer.branches_computed, layer.branches_total),
        "tokens attended": _share(layer.tokens_attended, layer.tokens_total),
        "shared rows": layer.shared_rows,
        "unmatched": layer.unmatched,
        "dropped": layer.dropped,
        "FLOPs /": round(layer.flops_full / layer.flops_computed, 2) if layer.flops_computed else 1,
    }
