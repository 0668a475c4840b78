"""A forward with code objects of its own, for one instance and this backend.

Dynamo keeps what it compiled, and the mark that it gave up on a frame, with the code object, which
all instances of a class share, and all backends. A captured model gets a forward of its own, so
that another backend giving up on the class or on this very model, or eight other instances of it,
cannot take the captured graph along.

    type(model).forward          code shared by the class; other backends and eager calls end there
    model.forward  (instance)    asks who is compiling: a call in a few lines, never given up on
      -> the copy                same bytecode, globals, cells; own code objects
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any, cast

from torch import nn

from ..torch_compat import KEEP_HOST_READS
from .function_source import HELPER_PREFIX, build

_DECLARED, _COPY, _SETTINGS, _OURS, _ACTS = (
    f"{HELPER_PREFIX}{name}" for name in ("declared", "copy", "settings", "ours", "acts")
)
_KINDS = inspect.Parameter


def own_forward(
    declared: FunctionType,
    ours: Callable[[], bool],
    keeps_reads: Callable[[nn.Module], bool] | None = None,
) -> FunctionType:
    """`declared` with the same parameters, which calls a copy of it where `ours` says yes.

    ours: whether this backend is compiling. keeps_reads: asked with the module, whether the copy is
    traced so that host reads do not break the graph; None: never.
    """
    parameters = list(inspect.signature(declared, follow_wrapped=False).parameters.values())
    passed = f"({', '.join(_passed(p) for p in parameters)})"
    first = parameters[0]  # self; of a decorated method often the first of *args
    owner = f"{first.name}[0]" if first.kind is _KINDS.VAR_POSITIONAL else first.name
    with_reads = f"""
        if {_ACTS}({owner}):
            with {_SETTINGS}:
                return {_COPY}{passed}"""
    text = f"""def forward({_declared(parameters)}):
    if {_OURS}():{with_reads if keeps_reads is not None else ""}
        return {_COPY}{passed}
    return {_DECLARED}{passed}"""
    definition = cast(ast.FunctionDef, ast.parse(text).body[0])
    for node in ast.walk(definition):  # tracebacks show the original's first line
        if hasattr(node, "lineno"):
            vars(node)["lineno"] = vars(node)["end_lineno"] = declared.__code__.co_firstlineno
    copied = copy_function(declared)
    helpers: dict[str, Any] = {_DECLARED: declared, _COPY: copied, _OURS: ours}
    if keeps_reads is not None:
        helpers |= {_ACTS: keeps_reads, _SETTINGS: KEEP_HOST_READS}
    own = build(definition, declared, helpers)
    own.__doc__ = declared.__doc__
    vars(own).update({**vars(declared), "__wrapped__": copied})
    return own


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


def copy_function(function: FunctionType) -> FunctionType:
    """The same function on new code objects, decorators by closure (`functools.wraps`) included."""
    wrapped = vars(function).get("__wrapped__")
    inner = copy_function(wrapped) if isinstance(wrapped, FunctionType) else None
    cells = tuple(
        CellType(inner) if inner is not None and _holds(cell, wrapped) else cell
        for cell in function.__closure__ or ()
    )
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        cells or None,
    )
    own.__kwdefaults__ = cast(dict[str, Any], function.__kwdefaults__)
    own.__qualname__, own.__doc__ = function.__qualname__, function.__doc__
    own.__module__ = function.__module__
    vars(own).update(vars(function))
    if inner is not None:
        vars(own)["__wrapped__"] = inner
    return own


def _holds(cell: CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # an empty cell
        return False
