"""A graph that turns gradients off for all it does, as one to be called without gradients.

    before:  set_grad_enabled(False); y = f(x); set_grad_enabled(True); return y
    after:   y = f(x); return y                             (under torch.no_grad())

That is what `@torch.no_grad()` on a model's forward becomes.
"""

from __future__ import annotations

from torch.fx import GraphModule

from ..torch_compat import gradient_switch


def strip_no_grad(gm: GraphModule) -> bool:
    """Remove the switches if gradients are off from the first op to the last; whether they were."""
    calls = [n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    switches = [gradient_switch(n) for n in calls]
    if len(calls) < 2 or switches[0] is not False or switches[-1] is None:
        return False
    if any(state is True for state in switches[:-1]):
        return False
    for node, state in zip(calls, switches, strict=True):
        if state is not None:
            gm.graph.erase_node(node)
    gm.recompile()
    return True
