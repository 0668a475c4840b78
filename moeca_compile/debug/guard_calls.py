"""What the guard of a reuse step saw and decided, branch by branch, caught while the graph runs.

GuardWatch(dialect graph)(*inputs)   ->  outputs;  .calls: one GuardCall a layer
call.score, call.limit, call.computed, call.expert    [T, K] in slot order
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter

from ..lowering.guards import score_branches

GUARD = torch.ops.moeca.guard_branches.default


@dataclass(frozen=True)
class GuardCall:
    """One layer's decision, all [T, K] in slot order. limit: tau_e of the branch's expert."""

    expert: Tensor
    weight: Tensor
    score: Tensor
    limit: Tensor
    matched: Tensor
    computed: Tensor

    @property
    def dropped(self) -> Tensor:
        """Neither cached nor computed: beyond the budget."""
        return ~self.matched & ~self.computed


class GuardWatch:
    """Runs a dialect graph node by node and keeps what its guards decided in the last run."""

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        self.calls: list[GuardCall] = []
        self._interpreter = _Interpreter(gm, self.calls)

    def __call__(self, *args: Any) -> Any:
        self.calls.clear()
        return self._interpreter.run(*args)


class _Interpreter(Interpreter):
    def __init__(self, gm: torch.fx.GraphModule, calls: list[GuardCall]) -> None:
        super().__init__(gm)
        self._calls = calls

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        result = super().call_function(target, args, kwargs)
        if target is GUARD:
            self._calls.append(_guard_call(args, result))
        return result


def _guard_call(args: tuple, result: Any) -> GuardCall:
    _, _, _, slot_weight, slot_norm, drift, thresholds, samples, _, score, *weights = args
    computed, expert, _, share, matched = result
    scores = score_branches(share, matched, slot_weight, slot_norm, drift, samples, score, *weights)
    return GuardCall(expert, share, scores, thresholds[expert], matched, computed)
