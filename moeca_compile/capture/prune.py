"""Dropping the statements that a replaced dispatch leaves without readers.

    counts = bincount(ids); parts = x.split(counts.tolist()); out = <replaced>; return out
        ->  out = <replaced>; return out

Backward liveness over names. Calls count as pure when the original reads their result (and the
replacement no longer does); a result that the original never read was computed for its effect and
stays. The caller checks the outcome by comparing values.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass
from typing import cast

from .statements import (
    bound_names,
    changed_names,
    grows_container,
    is_in_place,
    parameter_names,
    read_names,
    stored_names,
)

LOST_NAMES = "moeca_lost"
_NUMBER = "moeca_number"
_EFFECT = "moeca_effect"
_FRESH_CALLS = ("list", "dict", "set")
_IMPURE = (ast.Return, ast.Raise, ast.Yield, ast.YieldFrom, ast.Await, ast.Global, ast.Nonlocal)
_PRUNABLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.For, ast.While, ast.Expr)


def mark_effects(definition: ast.FunctionDef) -> None:
    """Mark calls whose result the original never reads: they are there for their effect."""
    for number, node in enumerate(ast.walk(definition)):
        setattr(node, _NUMBER, number)
    trial = copy.deepcopy(definition)
    prune(trial)
    left = {getattr(node, _NUMBER, -1) for node in ast.walk(trial)}
    for node in ast.walk(definition):
        if isinstance(node, _PRUNABLE) and getattr(node, _NUMBER) not in left:
            setattr(node, _EFFECT, any(isinstance(inner, ast.Call) for inner in ast.walk(node)))


def prune(definition: ast.FunctionDef) -> None:
    """Drop local computations that nothing reads; stores to attributes and calls for effect stay.

    Raises ValueError when a replaced statement also set names that are read later.
    """
    pruner = _Pruner(_fresh_names(definition), _borrowed_names(definition))
    definition.body, _ = pruner.suite(definition.body, set())


@dataclass(frozen=True)
class _Pruner:
    """fresh: containers made here; borrowed: parameters whose objects the caller sees."""

    fresh: frozenset[str]
    borrowed: frozenset[str]

    def suite(self, body: list[ast.stmt], live: set[str]) -> tuple[list[ast.stmt], set[str]]:
        kept: list[ast.stmt] = []
        for statement in reversed(body):
            replacement, live = self._statement(statement, live)
            if replacement is not None:
                kept.append(replacement)
        return kept[::-1], live

    def _statement(self, statement: ast.stmt, live: set[str]) -> tuple[ast.stmt | None, set[str]]:
        lost = cast(set[str], getattr(statement, LOST_NAMES, set())) & live
        if lost:
            raise ValueError(f"the replaced statement also sets {', '.join(sorted(lost))}")
        if isinstance(statement, (ast.Delete, ast.Pass)):
            return None, live
        if isinstance(statement, ast.If):
            return self._if(statement, live)
        if isinstance(statement, ast.With):
            return self._with(statement, live)
        binds = bound_names(statement)
        if not binds & live and self._only_local(statement):
            return None, live
        if _is_plain_assignment(statement):
            live = live - binds
        augmented = binds if isinstance(statement, ast.AugAssign) else set[str]()
        return statement, live | read_names(statement) | augmented

    def _if(self, node: ast.If, live: set[str]) -> tuple[ast.stmt | None, set[str]]:
        body, live_body = self.suite(node.body, set(live))
        orelse, live_else = self.suite(node.orelse, set(live))
        if not body and not orelse:
            return None, live
        node.body, node.orelse = body or [ast.copy_location(ast.Pass(), node)], orelse
        return node, live_body | live_else | read_names(node.test)

    def _with(self, node: ast.With, live: set[str]) -> tuple[ast.stmt | None, set[str]]:
        body, live = self.suite(node.body, set(live))
        if not body:
            return None, live
        node.body = body
        return node, live.union(*(read_names(item) for item in node.items))

    def _only_local(self, statement: ast.stmt) -> bool:
        """Whether local names are all that `statement` can change."""
        if not isinstance(statement, _PRUNABLE) or getattr(statement, _EFFECT, False):
            return False
        if changed_names(statement) & self.borrowed or not bound_names(statement):
            return False
        return not any(self._reaches_out(node) for node in ast.walk(statement))

    def _reaches_out(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute):
            return isinstance(node.ctx, ast.Store)
        if isinstance(node, ast.Expr):
            return not is_in_place(node.value)
        if grows_container(node):
            return not changed_names(node) & self.fresh
        return isinstance(node, _IMPURE)


def _is_plain_assignment(statement: ast.stmt) -> bool:
    """Whether every bound name gets a new value, so that its old one is not needed above."""
    if isinstance(statement, ast.AnnAssign):
        return isinstance(statement.target, ast.Name)
    if not isinstance(statement, ast.Assign):
        return False
    walked = (n for target in statement.targets for n in ast.walk(target))
    new_only = (ast.Name, ast.Tuple, ast.List, ast.Starred, ast.expr_context)
    changes = any(is_in_place(n) for n in ast.walk(statement.value))
    return not changes and all(isinstance(n, new_only) for n in walked)


def _fresh_names(definition: ast.FunctionDef) -> frozenset[str]:
    """Locals only ever bound to a list, dict or set made here: changing those stays in here."""
    made_here = [
        target.id
        for node in ast.walk(definition)
        if isinstance(node, ast.Assign)
        for whole in node.targets
        for target, value in _pairs(whole, node.value)
        if isinstance(target, ast.Name) and _makes_container(value)
    ]
    stores = stored_names(definition)
    once = {name for name in made_here if stores.count(name) == made_here.count(name)}
    return frozenset(once) - parameter_names(definition)


def _pairs(target: ast.expr, value: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    """`a, b = x, y` as (a, x), (b, y)."""
    if not isinstance(target, ast.Tuple) or not isinstance(value, ast.Tuple):
        return [(target, value)]
    return list(zip(target.elts, value.elts))


def _makes_container(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id in _FRESH_CALLS
    return isinstance(value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp))


def _borrowed_names(definition: ast.FunctionDef) -> frozenset[str]:
    """Parameters that are never rebound: changing their object changes the caller's."""
    return parameter_names(definition) - frozenset(stored_names(definition))
