"""Keeping values and sizes that a model reads on the host inside the graph, as a last resort.

    parts = rows.split(counts.tolist())    breaks the graph   ->   sizes become symbols of the graph

Dynamo can do that, but not by default, and not for every model: it raises where it has to know a
symbol. So the model is traced whole once before its forward is left to ask for it.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..graph.constant_reads import open_reads
from ..graph.region import source_line
from ..torch_compat import KEEP_HOST_READS, leaves, trace_whole
from .activity import BACKEND_MARK
from .function_source import HELPER_PREFIX, build
from .replay import close
from .sandbox import copy_arguments

_INNER = f"{HELPER_PREFIX}inner"
_SETTINGS = f"{HELPER_PREFIX}settings"
_ACTIVE = f"{HELPER_PREFIX}active"
_LOOSE = 5e-2  # of the scale: low precision, sums in another order
_EXACT = (torch.float32, torch.float64)
_KINDS = inspect.Parameter


def with_symbols(function: FunctionType, active: Callable[[nn.Module], bool]) -> FunctionType:
    """`function` with the same parameters, traced so that host reads do not break the graph.

    active: asked with the module while Dynamo traces; where it says no, nothing is changed.
    """
    parameters = list(inspect.signature(function, follow_wrapped=False).parameters.values())
    owner = parameters[0].name
    call = f"{_INNER}({', '.join(_passed(p) for p in parameters)})"
    lines = (
        f"def {function.__name__}({_declared(parameters)}):",
        f"    if {_ACTIVE}({owner}):",
        f"        with {_SETTINGS}:",
        f"            return {call}",
        f"    return {call}",
    )
    definition = cast(ast.FunctionDef, ast.parse("\n".join(lines)).body[0])
    helpers = {_INNER: function, _SETTINGS: KEEP_HOST_READS, _ACTIVE: active}
    return build(definition, function, helpers)


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


def _declared(parameters: list[inspect.Parameter]) -> str:
    """The parameter list; defaults are put in place on the function object."""
    parts, keyword_only = [], False
    for index, parameter in enumerate(parameters):
        if parameter.kind is _KINDS.KEYWORD_ONLY and not keyword_only:
            parts += ["*"]
        star = {_KINDS.VAR_POSITIONAL: "*", _KINDS.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else "=None"
        parts.append(f"{star}{parameter.name}{default}")
        keyword_only |= parameter.kind in (_KINDS.KEYWORD_ONLY, _KINDS.VAR_POSITIONAL)
        later = parameters[index + 1].kind if index + 1 < len(parameters) else None
        if parameter.kind is _KINDS.POSITIONAL_ONLY and later is not _KINDS.POSITIONAL_ONLY:
            parts += ["/"]
    return ", ".join(parts)


def _passed(parameter: inspect.Parameter) -> str:
    forms = {
        _KINDS.VAR_POSITIONAL: f"*{parameter.name}",
        _KINDS.VAR_KEYWORD: f"**{parameter.name}",
        _KINDS.KEYWORD_ONLY: f"{parameter.name}={parameter.name}",
    }
    return forms.get(parameter.kind, parameter.name)


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
