"""Keeping values and sizes that a model reads on the host inside the graph, as a last resort.

    parts = rows.split(counts.tolist())    breaks the graph   ->   sizes become symbols of the graph

Dynamo can do that, but not by default, and not for every model: it raises where it has to know a
symbol. So the model is traced whole once before its forward is left to ask for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..graph.constant_reads import open_reads
from ..graph.region import source_line
from ..torch_compat import leaves, trace_whole
from .activity import BACKEND_MARK
from .replay import close
from .sandbox import copy_arguments

_LOOSE = 5e-2  # of the scale: low precision, sums in another order
_EXACT = (torch.float32, torch.float64)


def whole_trace_failure(
    root: nn.Module, args: Any, kwargs: Any, expected: Any, constant: bool = False
) -> str:
    """Why `root` as it is now gives no whole graph, or one of other values; "" if it does.

    expected: the eager result on the same arguments. constant: numbers that are read may depend on
    no tensor input.
    """
    reads: list[Node] = []

    def run_as_is(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        reads.extend(open_reads(gm, inputs))
        return gm.forward

    setattr(run_as_is, BACKEND_MARK, True)
    try:
        found = trace_whole(root, run_as_is)(*copy_arguments(args), **copy_arguments(kwargs))
    except Exception as error:  # Dynamo's or the model's own: it stays in fragments
        return _told(error)
    if constant and reads:
        return f"what is read at {source_line(reads[0]) or reads[0].name} depends on an input"
    return "" if _agree(found, expected) else "the whole graph gives other values"


def _agree(found: Any, expected: Any) -> bool:
    results, wanted = leaves(found)[0], leaves(expected)[0]
    if all(t.dtype in _EXACT for t in wanted if isinstance(t, Tensor) and t.is_floating_point()):
        return close(found, expected)
    return len(results) == len(wanted) and all(_near(a, b) for a, b in zip(results, wanted))


def _near(found: Any, expected: Any) -> bool:
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        return type(found) is type(expected)
    if found.shape != expected.shape:
        return False
    scale = float(expected.double().nan_to_num().abs().max()) if expected.numel() else 0.0
    return torch.allclose(
        found.double(), expected.double(), rtol=0.0, atol=_LOOSE * scale + 1e-9, equal_nan=True
    )


def _told(error: Exception) -> str:
    """The first line of a message and the last place in a user's file that it names."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    library = str(torch.__path__[0])
    places = [p for p in re.findall(r'File "([^"]+)", line (\d+)', text) if library not in p[0]]
    return f"{first} ({places[-1][0]}:{places[-1][1]})" if places else first
