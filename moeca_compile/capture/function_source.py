"""From a function to its syntax tree and back, keeping globals, closure cells and line numbers.

    parsed = parse(MoE.forward)               # ast.FunctionDef with the file's line numbers
    build(parsed, MoE.forward, {"helper": f}) # new function, helper as a closure cell

Helpers come in as closure cells because a function with a copied globals dict fails in Dynamo.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from types import CellType, CodeType, FunctionType
from typing import Any

_FACTORY = "_moeca_factory"
HELPER_PREFIX = "_moeca_"


def parse(function: FunctionType) -> ast.FunctionDef:
    """The definition of `function` without decorators and annotations.

    Raises ValueError if the source cannot be had or does not hold a plain function definition.
    """
    try:
        lines, start = inspect.getsourcelines(function)
    except (OSError, TypeError) as error:
        raise ValueError(f"no source for {function.__qualname__}: {error}") from error
    try:
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except SyntaxError as error:
        raise ValueError(f"source of {function.__qualname__} does not parse alone") from error
    definition = tree.body[0] if tree.body else None
    if not isinstance(definition, ast.FunctionDef):
        raise ValueError(f"{function.__qualname__} is not a plain function definition")
    ast.increment_lineno(definition, max(start, 1) - 1)
    definition.decorator_list = []
    definition.returns = None
    every = definition.args
    for argument in (*every.posonlyargs, *every.args, *every.kwonlyargs, every.vararg, every.kwarg):
        if argument is not None:
            argument.annotation = None
    return definition


def build(
    definition: ast.FunctionDef, function: FunctionType, helpers: Mapping[str, Any]
) -> FunctionType:
    """Compile `definition` as a stand-in for `function`; free names in `helpers` become cells."""
    names = [*function.__code__.co_freevars, *helpers]
    owner = _owner_name(function)
    body: list[ast.stmt] = [definition]
    if owner:  # inside a class, so that private names are mangled as in the original
        body = [ast.ClassDef(owner, bases=[], keywords=[], body=body, decorator_list=[])]
    arguments = [ast.arg(name) for name in dict.fromkeys(names)]
    factory = ast.FunctionDef(
        name=_FACTORY,
        args=ast.arguments([], arguments, None, [], [], None, []),
        body=body,
        decorator_list=[],
    )
    if hasattr(ast, "TypeVar"):  # Python 3.12 added required fields
        for node in (factory, *body):
            node.type_params = getattr(node, "type_params", [])  # type: ignore[attr-defined]
    module = ast.fix_missing_locations(ast.Module([factory], []))
    compiled = compile(module, function.__code__.co_filename, "exec")
    code = _find_code(compiled, definition.name)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
    cells.update({name: CellType(value) for name, value in helpers.items()})
    closure = tuple(cells[name] for name in code.co_freevars)
    result = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure
    )
    result.__kwdefaults__ = function.__kwdefaults__
    result.__qualname__ = function.__qualname__
    result.__module__ = function.__module__
    return result


def _owner_name(function: FunctionType) -> str:
    parts = function.__qualname__.split(".")
    return parts[-2] if len(parts) > 1 and parts[-2].isidentifier() else ""


def _find_code(code: CodeType, name: str) -> CodeType:
    pending = [code]
    while pending:
        current = pending.pop()
        if current.co_name == name:
            return current
        pending.extend(constant for constant in current.co_consts if isinstance(constant, CodeType))
    raise ValueError(f"compiled module does not hold {name}")
