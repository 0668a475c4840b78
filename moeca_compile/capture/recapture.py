"""Bringing a captured model back to one graph after calls that broke it up.

eval, no_grad    one graph, captured
train or grad    the original dispatch breaks: Dynamo compiles pieces and gives up on the root
eval, no_grad    runs pieces; at the end of the second call in which pieces ran and the captured
                 graph did not, Dynamo's marks are lifted
next call        one graph again
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import GraphModule

from ..torch_compat import on_call_end, reset_code, traced_frame
from .roots import Phase, RootCall, RootRegistry, entry_codes, is_of_root
from .trigger import acts_now, count_dispatches, holds_all_dispatches


@dataclass(frozen=True)
class Recapture:
    """Watches pieces of captured roots.

    calls_of: how often captured graphs of a root have run. on_lift: told when a root will be
    traced anew.
    """

    registry: RootRegistry
    calls_of: Callable[[nn.Module], int]
    on_lift: Callable[[nn.Module], None]
    _ran: weakref.WeakKeyDictionary[nn.Module, int] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    _pending: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)
    _beside: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)

    def wrap(
        self, gm: GraphModule, call: RootCall, compile_now: Callable[[], Callable[..., Any]]
    ) -> Callable[..., Any]:
        """What `compile_now` returns; a piece that stands where the captured graph should run is
        run as it is instead, and every piece of a broken call watches for the mode to change."""
        state, frame = self.registry.find(call.root), traced_frame()
        captured = state is not None and state.phase is Phase.CAPTURED
        if not captured or state is None or frame is None:
            return compile_now()
        whole = frame.code in entry_codes(call) and not frame.breaks
        of_root = is_of_root(frame.code, call)
        if whole or (of_root and holds_all_dispatches(frame, call.root)):
            return compile_now()
        acts = acts_now(call, state)
        if acts and not count_dispatches(frame):
            return compile_now()  # a part beside the captured graph
        inner = gm.forward if acts else compile_now()
        owner = weakref.ref(call.root)

        def piece(*args: Any) -> Any:
            self.runs_beside(owner())
            return inner(*args)

        return piece

    def runs_beside(self, root: nn.Module | None) -> bool:
        """Whether the captured graph runs too in the calls in which pieces of `root` run.

        To be asked whenever a piece runs. The answer is that of the calls before; that of the call
        at hand is known at its end.
        """
        state = self.registry.find(root) if root is not None else None
        if root is None or state is None or state.phase is not Phase.CAPTURED:
            return False
        call = self.registry.current_call()
        if (
            call is not None
            and call.root is root
            and root not in self._pending
            and acts_now(call, state)
            and on_call_end(call.call, self._judge_later(call))
        ):
            self._pending.add(root)
        return root in self._beside

    def _judge_later(self, call: RootCall) -> Callable[[], None]:
        owner, codes = weakref.ref(call.root), entry_codes(call)

        def judge() -> None:
            root = owner()
            if root is None:
                return
            self._pending.discard(root)
            before, self._ran[root] = self._ran.get(root), self.calls_of(root)
            if before is not None and before < self._ran[root]:
                self._beside.add(root)
            elif before is not None:
                self._beside.discard(root)
                for code in codes:
                    reset_code(code)
                self.on_lift(root)

        return judge
