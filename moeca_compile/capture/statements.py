"""Small syntax-tree facts and edits that statement-level capture is made of.

    fold_training:    `if self.training: A else: B`  ->  `B`
    name_returns:     `return f(x)`                  ->  `r = f(x); return r`
    bound_names:      what a statement sets or changes in place
"""

from __future__ import annotations

import ast

RETURN_NAME = "moeca_result"
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


def bound_names(node: ast.AST) -> set[str]:
    """Names that `node` binds, or whose object it changes: `n[..] = ..`, `n.op_(..)`, `n.append(..)`."""
    names = changed_names(node)
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            names.add(inner.id)
        elif isinstance(inner, (ast.FunctionDef, ast.ClassDef)):
            names.add(inner.name)
    return names


def changed_names(node: ast.AST) -> set[str]:
    """Names whose object `node` changes in place."""
    names: set[str] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Subscript) and isinstance(inner.ctx, ast.Store):
            names.add(_root(inner))
        elif isinstance(inner, ast.Call) and is_in_place(inner):
            names.add(_root(inner.func))
    return names - {""}


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


def is_in_place(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    name = node.func.attr
    return name in _GROWING or (name.endswith("_") and not name.startswith("_"))


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
