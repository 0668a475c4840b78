"""Which rows of a layer differ most, and why they were not computed: age, score, threshold.

token 17: 83 % off   expert 3: read, 2 steps old, score 0.41 of threshold 0.90
                     expert 5: computed, score 0.95 of threshold 0.88
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..passes.cache_plan import LayerPlan
from .guard_calls import GuardCall
from .taps import Tap

SHOWN = 5


@dataclass(frozen=True)
class Branch:
    """One slot of a token. age: steps since the expert ran for it, 0 if it ran in this one.

    fate: "computed", "read" or "dropped"; share: of the token's router weight.
    """

    expert: int
    fate: str
    age: int
    share: float
    score: float
    threshold: float

    def __str__(self) -> str:
        old = f", {self.age} steps old" if self.age else ""
        return (
            f"expert {self.expert} ({100 * self.share:.0f} % of the weight): {self.fate}{old}, "
            f"score {self.score:.2f}, threshold {self.threshold:.2f}"
        )


@dataclass(frozen=True)
class Row:
    """One token. position: within its sample; difference: relative to the full row's norm."""

    sample: int
    position: int
    difference: float
    branches: tuple[Branch, ...]


class RowWatch:
    """Knows how old every branch of every lane is: ages per layer, [T, K] in slot order."""

    def __init__(self, layers: Sequence[LayerPlan]) -> None:
        self._layers = layers
        self._ages: dict[int, list[Tensor]] = {}

    def ran(self, lane: int, kind: str, guards: Sequence[GuardCall]) -> None:
        """One more step of the lane: what it computed is new, the rest a step older."""
        ages = self._ages.get(lane)
        if kind in ("refresh", "plain") or ages is None:
            shapes = [(layer.tokens, layer.region.top_k) for layer in self._layers]
            self._ages[lane] = [torch.zeros(shape, dtype=torch.int64) for shape in shapes]
            return
        fresh = [g.computed.cpu() for g in guards] if len(guards) == len(ages) else None
        for number, age in enumerate(ages):
            older = age + 1
            ages[number] = older if fresh is None else torch.where(fresh[number], 0, older)

    def worst(
        self, lane: int, tap: Tap, wanted: Tensor, got: Tensor, guards: Sequence[GuardCall]
    ) -> tuple[Row, ...]:
        """The SHOWN tokens that differ most."""
        full, cached = tap.by_token(wanted), tap.by_token(got)
        size = full.norm(dim=1).clamp(min=1e-30)
        difference = ((cached - full).norm(dim=1) / size).cpu()
        known = len(guards) == len(self._layers)
        guard = guards[tap.number] if known else None
        tokens = self._layers[tap.number].region.space.tokens
        rows = []
        for token in difference.topk(min(SHOWN, len(difference))).indices.tolist():
            branches = () if guard is None else self._branches(lane, tap.number, token, guard)
            rows.append(Row(token // tokens, token % tokens, float(difference[token]), branches))
        return tuple(rows)

    def _branches(self, lane: int, layer: int, token: int, guard: GuardCall) -> tuple[Branch, ...]:
        def number(values: Tensor, slot: int) -> float:
            return values[token, slot].item()

        found = []
        for slot in range(guard.expert.shape[1]):
            computed, matched = number(guard.computed, slot), number(guard.matched, slot)
            fate = "computed" if computed else "read" if matched else "dropped"
            found.append(
                Branch(
                    int(number(guard.expert, slot)), fate,
                    int(self._ages[lane][layer][token, slot]),
                    number(guard.weight, slot), number(guard.score, slot),
                    number(guard.limit, slot),
                )
            )  # fmt: skip
        return tuple(found)
