"""Watching the locals of a function while it runs, statement by statement.

    out = f(x)      ->      note(7, False, locals()); out = f(x); note(7, True, locals())

An instrumented function can also be made to use other values for some locals from their first
assignment on: that is how a statement is probed with routings the router would not choose.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from torch import Tensor

from .function_source import HELPER_PREFIX, build
from .statements import parameter_names, stored_names, suites

_NOTE = f"{HELPER_PREFIX}note"
_OVERRIDE = f"{HELPER_PREFIX}override"


@dataclass(frozen=True)
class Event:
    """One run of statement `number`: copies of the locals before and after it."""

    number: int
    before: Mapping[str, Any]
    after: Mapping[str, Any]

    def changed(self) -> list[str]:
        """Names whose tensor is new or was changed in place."""
        return [
            name
            for name, value in self.after.items()
            if isinstance(value, Tensor) and self.before.get(name) is not value
        ]


@dataclass
class Trace:
    """Collects events of the first call of an instrumented function."""

    events: list[Event] = field(default_factory=list)
    _open: dict[int, dict[str, Any]] = field(default_factory=dict)
    _copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def note(self, number: int, after: bool, values: dict[str, Any]) -> None:
        """Called from the instrumented function around each statement."""
        snapshot = {n: self._copy(v) for n, v in values.items() if not n.startswith(HELPER_PREFIX)}
        if not after:
            self._open[number] = snapshot
        elif all(event.number != number for event in self.events):
            self.events.append(Event(number, self._open[number], snapshot))

    def _copy(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_inference():  # a parameter made in inference mode: its changes are not counted
            return value.clone()
        key = (id(value), value._version)
        if key not in self._copies:
            self._copies[key] = (value, value.clone())  # holding the original keeps its id taken
        return self._copies[key][1]


def watched(definition: ast.FunctionDef) -> list[ast.stmt]:
    """The statements that get numbers, in a stable order: those that run at most once a call."""
    compound = (ast.If, ast.With, ast.Return, ast.Raise)
    return [s for suite in suites(definition) for s in suite if not isinstance(s, compound)]


def instrument(
    definition: ast.FunctionDef,
    function: FunctionType,
    trace: Trace,
    override: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> FunctionType:
    """`function` with its watched statements noted in `trace` and some locals overridden.

    override: per name, what to make of the first tensor that the name is bound to.
    """
    override = dict(override or {})
    used: set[str] = set()

    def replace_value(name: str, value: Any) -> Any:
        if name in used or not isinstance(value, Tensor):
            return value
        used.add(name)
        return override[name](value)

    tree = copy.deepcopy(definition)
    numbers = {id(statement): number for number, statement in enumerate(watched(tree))}
    for suite in suites(tree):
        suite[:] = [new for old in suite for new in _noted(old, numbers, override)]
    head = [_override_call(name) for name in override if name in parameter_names(definition)]
    tree.body[:0] = [ast.fix_missing_locations(ast.copy_location(s, tree.body[0])) for s in head]
    helpers = {_NOTE: trace.note, _OVERRIDE: replace_value}
    return build(tree, function, helpers)


def _noted(
    statement: ast.stmt, numbers: Mapping[int, int], override: Mapping[str, Any]
) -> list[ast.stmt]:
    number = numbers.get(id(statement))
    if number is None:
        return [statement]
    bound = stored_names(statement)
    added = [_override_call(name) for name in override if name in bound]
    result = [_note_call(number, False), statement, *added, _note_call(number, True)]
    return [ast.fix_missing_locations(ast.copy_location(s, statement)) for s in result]


def _note_call(number: int, after: bool) -> ast.stmt:
    values = ast.Call(ast.Name("locals", ast.Load()), [], [])
    arguments: list[ast.expr] = [ast.Constant(number), ast.Constant(after), values]
    return ast.Expr(ast.Call(ast.Name(_NOTE, ast.Load()), arguments, []))


def _override_call(name: str) -> ast.stmt:
    arguments: list[ast.expr] = [ast.Constant(name), ast.Name(name, ast.Load())]
    call = ast.Call(ast.Name(_OVERRIDE, ast.Load()), arguments, [])
    return ast.Assign([ast.Name(name, ast.Store())], call)
