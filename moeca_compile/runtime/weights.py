"""Whether the weights are still the ones the cached rows were computed with.

    load_state_dict, p.add_(), an optimiser step   -> the version counter moves
    p.data = other                                 -> the address moves
    load_state_dict(assign=True)                   -> pass the call's own parameters to `changed`

About 0.1 us per parameter. Limit: `p.data.add_(...)` moves neither (torch keeps no record of it),
and an in-place edit of a parameter made in inference mode leaves none either.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_

from torch import Tensor

_version = attrgetter("_version")


class WeightVersion:
    """Remembers versions and addresses of the parameters; holds them, so none is recycled."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._remember(params)

    def _remember(self, params: Sequence[Tensor]) -> None:
        self._params = tuple(params)
        self._versioned = [p for p in self._params if not p.is_inference()]
        self._state = self._read()

    def _read(self) -> tuple[int, list[int]]:
        # Every version counter only grows, so the sum moves whenever one does.
        return sum(map(_version, self._versioned)), list(map(Tensor.data_ptr, self._params))

    def changed(self, params: Sequence[Tensor] | None = None) -> bool:
        """True once after any change since the last call.

        params: the parameters of this call, when they may be other objects than before.
        """
        if params is not None and not _same_objects(params, self._params):
            self._remember(params)
            return True
        state = self._read()
        if state == self._state:
            return False
        self._state = state
        return True


def _same_objects(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return len(left) == len(right) and all(map(is_, left, right))
