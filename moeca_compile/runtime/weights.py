"""Whether the weights are still the ones the cached rows were computed with.

    load_state_dict, p.add_(), an optimiser step   -> the version counter moves
    p.data = other                                 -> the address moves
    load_state_dict(assign=True)                   -> pass the call's own parameters to `changed`

About 0.1 us per parameter. Parameters and their storages are held weakly: a compiled model that is
deleted frees its weights, and a storage that died counts as a change, since its address may have
been given out again. Limit: `p.data.add_(...)` moves neither (torch keeps no record of it), and an
in-place edit of a parameter made in inference mode leaves none either.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import attrgetter

from torch import Tensor

_version = attrgetter("_version")


class WeightVersion:
    """Remembers versions, addresses and identities of the parameters; keeps none of them alive."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._remember(params)

    def _remember(self, params: Sequence[Tensor]) -> None:
        died = self._died = [False]

        def note(_: object) -> None:
            died[0] = True  # not `self`: a weak reference must not keep this object alive

        self._refs = [weakref.ref(p, note) for p in params]
        self._storages = [weakref.ref(p.untyped_storage(), note) for p in params]
        self._ids = list(map(id, params))
        self._versioned = [i for i, p in enumerate(params) if not p.is_inference()]
        self._all_versioned = len(self._versioned) == len(params)
        self._state = self._read(params)

    def _read(self, params: Sequence[Tensor]) -> tuple[int, list[int]]:
        # Every version counter only grows, so the sum moves whenever one does.
        versioned = params if self._all_versioned else [params[i] for i in self._versioned]
        return sum(map(_version, versioned)), list(map(Tensor.data_ptr, params))

    def changed(self, params: Sequence[Tensor] | None = None) -> bool:
        """True once after any change since the last call.

        params: the parameters of this call, when they may be other objects than before.
        """
        if params is None:
            params = [p for p in (ref() for ref in self._refs) if p is not None]
        if self._died[0] or list(map(id, params)) != self._ids:
            self._remember(params)
            return True
        state = self._read(params)
        if state == self._state:
            return False
        self._remember(params)  # an address that moved is another storage to watch
        return True
