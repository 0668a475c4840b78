"""Small syntax-tree facts and edits that statement-level capture is made of.

fold_training:    `if self.training: A else: B`  ->  `B`
name_returns:     `return f(x)`                  ->  `r = f(x); return r`
bound_names:      what a statement sets or changes in place
kept_lines:       which lines of the user's file are left
"""

from __future__ import annotations

import ast

RETURN_NAME = "moeca_result"
REPLACED = "moeca_replaced"
_GROWING = ("append", "extend", "insert", "update", "setdefault", "add")


def suites(definition: ast.FunctionDef) -> list[list[ast.stmt]]:
    """The statement lists that run at most once a call: the body, and bodies of `if` and `with`."""
    found: list[list[ast.stmt]] = []
    pending: list[list[ast.stmt]] = [definition.body]
    while pending:
        suite = pending.pop()
        found.append(suite)
        for statement in suite:
            if isinstance(statement, ast.If):
                pending.extend((statement.body, statement.orelse))
            elif isinstance(statement, ast.With):
                pending.append(statement.body)
    return [suite for suite in found if suite]


def kept_lines(definition: ast.FunctionDef) -> frozenset[int]:
    """Lines of the user's file that still run: all but those of replaced statements."""
    lines: set[int] = set()
    for node in ast.walk(definition):
        if not isinstance(node, ast.stmt) or getattr(node, REPLACED, False):
            continue
        if isinstance(node, ast.Return) and read_names(node) == {RETURN_NAME}:
            continue
        if isinstance(node, (ast.If, ast.While)):
            parts: list[ast.AST] = [node.test]
        elif isinstance(node, ast.With):
            parts = [item.context_expr for item in node.items]
        elif isinstance(node, ast.For):
            parts = [node.iter]
        else:
            parts = [] if node is definition else [node]
        for part in parts:
            lines.update(range(part.lineno, (part.end_lineno or part.lineno) + 1))  # type: ignore[attr-defined]
    return frozenset(lines)


def bound_names(node: ast.AST) -> set[str]:
    """Names that `node` binds, or whose object it changes in place."""
    names = changed_names(node)
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            names.add(inner.id)
        elif isinstance(inner, (ast.FunctionDef, ast.ClassDef)):
            names.add(inner.name)
    return names


def changed_names(node: ast.AST) -> set[str]:
    """Names whose object `node` changes: `n[..] = ..`, `n.op_(..)`, `n.append(..)`."""
    names: set[str] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Subscript) and isinstance(inner.ctx, ast.Store):
            names.add(_root(inner))
        elif isinstance(inner, ast.Call) and is_in_place(inner):
            names.add(_root(inner.func))
    return names - {""}


def stored_names(node: ast.AST) -> list[str]:
    """Names that `node` binds, once for every time it does."""
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and _is_store(n)]


def parameter_names(definition: ast.FunctionDef) -> frozenset[str]:
    """Names of the parameters, the owner included."""
    every = definition.args
    named = (*every.posonlyargs, *every.args, *every.kwonlyargs, every.vararg, every.kwarg)
    return frozenset(argument.arg for argument in named if argument is not None)


def is_in_place(node: ast.AST) -> bool:
    """Whether `node` is a call by which an object changes: `t.add_(..)` or `l.append(..)`."""
    if grows_container(node):
        return True
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    return node.func.attr.endswith("_") and not node.func.attr.startswith("_")


def grows_container(node: ast.AST) -> bool:
    """Whether `node` is a call like `l.append(..)`."""
    called = node.func if isinstance(node, ast.Call) else None
    return isinstance(called, ast.Attribute) and called.attr in _GROWING


def read_names(node: ast.AST) -> set[str]:
    """Names that `node` reads, nested functions included."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def fold_training(definition: ast.FunctionDef) -> None:
    """Replace the module's `training` by False and drop branches that can no longer run."""
    arguments = (*definition.args.posonlyargs, *definition.args.args)
    if arguments:
        folder = _Folder(arguments[0].arg)
        definition.body = folder.suite(definition.body)


def name_returns(definition: ast.FunctionDef) -> None:
    """Give returned expressions a name, so that they can be recognised and replaced."""
    for suite in suites(definition):
        for index in range(len(suite) - 1, -1, -1):
            statement = suite[index]
            if isinstance(statement, ast.Return) and statement.value is not None:
                named = ast.Assign([ast.Name(RETURN_NAME, ast.Store())], statement.value)
                ast.copy_location(named, statement)
                statement.value = ast.Name(RETURN_NAME, ast.Load())
                suite.insert(index, ast.fix_missing_locations(named))
                ast.fix_missing_locations(statement)


def _root(node: ast.AST) -> str:
    while isinstance(node, (ast.Subscript, ast.Attribute, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _is_store(node: ast.Name | ast.Subscript) -> bool:
    return isinstance(node.ctx, ast.Store)


class _Folder(ast.NodeTransformer):
    def __init__(self, owner: str) -> None:
        self.owner = owner

    def suite(self, body: list[ast.stmt]) -> list[ast.stmt]:
        folded: list[ast.stmt] = []
        for statement in body:
            result = self.visit(statement)
            folded.extend(result if isinstance(result, list) else [result])
        return folded

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        is_owner = isinstance(node.value, ast.Name) and node.value.id == self.owner
        if is_owner and node.attr == "training" and isinstance(node.ctx, ast.Load):
            return ast.copy_location(ast.Constant(False), node)
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        test = self.visit(node.test)
        body, orelse = self.suite(node.body), self.suite(node.orelse)
        truth = _truth(test)
        if truth is not None:
            return (body if truth else orelse) or [ast.copy_location(ast.Pass(), node)]
        node.test, node.body, node.orelse = test, body, orelse
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        truth = _truth(node.test)
        return node if truth is None else (node.body if truth else node.orelse)


def _truth(test: ast.expr) -> bool | None:
    """The value of a test that contains folded constants, None if it depends on anything else."""
    if isinstance(test, ast.Constant):
        return bool(test.value)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = _truth(test.operand)
        return None if inner is None else not inner
    if isinstance(test, ast.BoolOp):
        decisive = isinstance(test.op, ast.Or)
        truths = [_truth(value) for value in test.values]
        # only the first operand may decide: the ones before a later one would still be evaluated
        if truths[0] is decisive:
            return decisive
        if all(truth is (not decisive) for truth in truths):
            return not decisive
    return None
