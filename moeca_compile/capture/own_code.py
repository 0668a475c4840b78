"""A copy of a function with code objects of its own.

Dynamo keeps what it compiled, and the mark that it gave up on a frame, with the code object, which
all instances of a class share. A captured model gets a forward of its own, so that another backend
giving up on the same class, or eight other instances of it, cannot take this model along.

    type(model).forward          code shared by the class
    model.forward  (instance)    same bytecode, globals, cells; own code object
"""

from __future__ import annotations

from types import CellType, FunctionType
from typing import Any, cast


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
