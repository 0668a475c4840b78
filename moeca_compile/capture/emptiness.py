"""Branches on whether a selection is empty, replaced by their body.

    if mask.any():                            rows = torch.where(mask)[0]
        rows = torch.where(mask)[0]     =>    out[rows] = f(x[rows])
        out[rows] = f(x[rows])

Right if the body changes nothing when it is run on an empty selection. That is tried: both forms
run with the selection emptied just before the branch and have to agree. Only tests that are false
for nothing but an empty selection count: `m.any()`, `len(i) > 0`, `i.numel() > 0`, `m.sum() > 0`.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from .function_source import HELPER_PREFIX, build
from .replay import close, probe_arguments
from .statements import suites
from .subject import Replay

_EMPTY = f"{HELPER_PREFIX}empty"
_MASK_METHODS = ("any", "sum", "count_nonzero")
_CONVERSIONS = ("item", "cpu", "bool", "tolist")


@dataclass(frozen=True)
class EmptinessTest:
    """An `if` without `else`. subject: the selection, a mask or a list of row numbers.

    rest: the other operands of an `and`.
    """

    node: ast.If
    subject: ast.Name
    is_mask: bool
    rest: tuple[ast.expr, ...]


class NotAnEmptiness(Exception):
    """The value that was tested is no selection: neither a mask nor a list of row numbers."""


def find_tests(definition: ast.FunctionDef) -> list[EmptinessTest]:
    """The emptiness tests of a function that run at most once a call, in order."""
    found = []
    for suite in suites(definition):
        for statement in suite:
            if isinstance(statement, ast.If) and not statement.orelse:
                test = _emptiness_test(statement)
                found += [test] if test is not None else []
    return sorted(found, key=lambda test: test.node.lineno)


def without_tests(
    definition: ast.FunctionDef, function: FunctionType, replay: Replay
) -> tuple[ast.FunctionDef, str]:
    """`definition` with every emptiness test gone that the replay allows, and why others stay."""
    current, skipped, refused = definition, 0, ""
    while len(tests := find_tests(current)) > skipped:
        line = tests[skipped].node.lineno
        trial = copy.deepcopy(current)
        _drop(trial, find_tests(trial)[skipped])
        reason = _difference(current, trial, skipped, function, replay)
        if reason:
            skipped, refused = skipped + 1, f"line {line}: {reason}"
        else:
            current = trial
    return current, refused


def _difference(
    before: ast.FunctionDef,
    after: ast.FunctionDef,
    number: int,
    function: FunctionType,
    replay: Replay,
) -> str:
    """What tells `after` (test `number` dropped) from `before` on an empty selection, or ""."""
    emptied = [_emptied(before, number, drop) for drop in (False, True)]
    kept, dropped = (build(tree, function, {_EMPTY: _empty}) for tree in emptied)
    for name, arguments in probe_arguments(replay.arguments):
        try:
            expected = replay.exact(kept, arguments)
            found = replay.exact(dropped, arguments)
        except Exception as error:  # user code on an empty selection may fail in any way
            return f"an empty selection raises {type(error).__name__}: {error}"
        if not close(found, expected):
            return f"{name} input: the branch does something for an empty selection"
    return replay.disagreement(build(after, function, {}))


def _emptied(definition: ast.FunctionDef, number: int, drop: bool) -> ast.FunctionDef:
    """A copy that empties the selection before test `number`; drop: the test is dropped too."""
    tree = copy.deepcopy(definition)
    test = find_tests(tree)[number]
    name = test.subject.id
    arguments: list[ast.expr] = [ast.Name(name, ast.Load()), ast.Constant(test.is_mask)]
    call = ast.Call(ast.Name(_EMPTY, ast.Load()), arguments, [])
    head = ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], call), test.node)
    ast.fix_missing_locations(head)
    suite = _suite_of(tree, test.node)
    suite.insert(suite.index(test.node), head)
    if drop:
        _drop(tree, test)
    return tree


def _drop(tree: ast.FunctionDef, test: EmptinessTest) -> None:
    suite = _suite_of(tree, test.node)
    at = suite.index(test.node)
    if not test.rest:
        suite[at : at + 1] = test.node.body
        return
    rest: list[ast.expr] = list(test.rest)
    test.node.test = rest[0] if len(rest) == 1 else ast.BoolOp(ast.And(), rest)
    ast.fix_missing_locations(ast.copy_location(test.node.test, test.node))


def _suite_of(tree: ast.FunctionDef, node: ast.stmt) -> list[ast.stmt]:
    return next(s for s in suites(tree) if any(statement is node for statement in s))


def _empty(value: Any, is_mask: bool) -> Any:
    """The empty selection of the same kind: no true entry, or no row numbers."""
    dtypes = (torch.bool,) if is_mask else (torch.int64, torch.int32)
    if not isinstance(value, Tensor) or not value.dim() or value.dtype not in dtypes:
        raise NotAnEmptiness("the value tested is neither a mask nor a list of row numbers")
    return torch.zeros_like(value) if is_mask else value[:0]


def _emptiness_test(node: ast.If) -> EmptinessTest | None:
    joined = isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And)
    operands = node.test.values if joined else [node.test]  # type: ignore[attr-defined]
    subjects = [_subject(operand) for operand in operands]
    named = [s for s in subjects if s is not None]
    if len(named) != 1:
        return None
    rest = tuple(o for o, s in zip(operands, subjects) if s is None)
    return EmptinessTest(node, *named[0], rest)


def _subject(test: ast.expr) -> tuple[ast.Name, bool] | None:
    """The name that `test` asks to be non-empty and whether it must be a mask, else None."""
    test = _unconverted(test)
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        zero, positive = test.comparators[0], isinstance(test.ops[0], (ast.Gt, ast.NotEq))
        if not positive or not isinstance(zero, ast.Constant) or zero.value != 0:
            return None
        test = _unconverted(test.left)
    if (mask := _method_subject(test)) is not None:
        return mask, True
    counted = _counted(test)
    return (counted, False) if counted is not None else None


def _counted(value: ast.expr) -> ast.Name | None:
    """x of `len(x)`, `x.numel()`, `x.size(0)`, `x.shape[0]`."""
    if isinstance(value, ast.Subscript) and isinstance(value.value, ast.Attribute):
        first = isinstance(value.slice, ast.Constant) and value.slice.value == 0
        found = value.value.value if value.value.attr == "shape" and first else None
    elif isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        found = value.args[0] if value.func.id == "len" and value.args else None
    elif isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        numbers = [a.value for a in value.args if isinstance(a, ast.Constant)]
        fits = (value.func.attr, numbers) in (("numel", []), ("size", [0]))
        found = value.func.value if fits else None
    else:
        return None
    return found if isinstance(found, ast.Name) else None


def _method_subject(call: ast.expr) -> ast.Name | None:
    """x of `x.any()`, `torch.any(x)` and the like, over all elements."""
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        return None
    if call.func.attr not in _MASK_METHODS or call.keywords:
        return None
    named = [call.func.value, *call.args]
    if isinstance(named[0], ast.Name) and named[0].id == "torch":
        named = named[1:]
    alone = named[0] if len(named) == 1 else None
    return alone if isinstance(alone, ast.Name) else None


def _unconverted(value: ast.expr) -> ast.expr:
    """Without `.item()`, `bool(..)`, `int(..)` and the like around it."""
    while isinstance(value, ast.Call):
        if isinstance(value.func, ast.Attribute) and value.func.attr in _CONVERSIONS:
            value = value.func.value
        elif isinstance(value.func, ast.Name) and value.func.id in ("bool", "int") and value.args:
            value = value.args[0]
        else:
            break
    return value
