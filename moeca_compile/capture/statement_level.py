"""Capture by replacing one statement of a function that does more than dispatch.

    before:  parts = x.split(counts.tolist())
             out = torch.cat([e(p) for e, p in zip(experts, parts)])
             out = out[inverse].view(-1, K, D)
    after:   out = run_plan(plan, self, {"x": x, "index": index})       what fed the loop is dropped

The statement is found by values: the one after which some local equals the selected expert rows
[T, K, D] or their weighted sum [T, D].
"""

from __future__ import annotations

import ast
import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor

from .function_source import HELPER_PREFIX, build, parse
from .instrument import Event, Trace, instrument, watched
from .method_level import (
    Found,
    Refused,
    choose_dtype,
    in_own_dtypes,
    random_like,
    routings,
)
from .plan import DispatchPlan, run_plan
from .propose import Evidence, propose
from .prune import LOST_NAMES, mark_effects, prune
from .recorder import ExpertRecord
from .replay import close
from .sandbox import exact_arithmetic
from .statements import REPLACED, bound_names, fold_training, kept_lines, name_returns
from .subject import Subject

_RUN = f"{HELPER_PREFIX}run_plan"
_PLAN = f"{HELPER_PREFIX}plan"
_MAX_CANDIDATES = 24


@dataclass(frozen=True)
class _Candidate:
    """Statement `number` sets local `name` to what `plan` computes."""

    number: int
    name: str
    plan: DispatchPlan


def capture_statements(subject: Subject) -> Found | Refused:
    """Replace the statement that completes the dispatch; drop what only fed it."""
    function = cast(FunctionType, subject.method.function)  # a field, not a bound method
    try:
        definition = copy.deepcopy(subject.definition) or parse(function)
        mark_effects(definition)
        fold_training(definition)
        name_returns(definition)
        record, trace = _record(subject, definition, function)
    except ValueError as error:
        return Refused(str(error))
    refused = Refused("no local equals the selected expert rows or their weighted sum")
    with exact_arithmetic(subject.device):
        evidences = record.evidences(subject.copied, subject.bank_path)
        candidates = [c for evidence in evidences for c in _candidates(evidence, trace)]
    for candidate in candidates[:_MAX_CANDIDATES]:
        outcome = _try(subject, definition, function, candidate)
        if isinstance(outcome, Found):
            return outcome
        refused = outcome
    return refused


def _record(
    subject: Subject, definition: ast.FunctionDef, function: FunctionType
) -> tuple[ExpertRecord, Trace]:
    trace = Trace()
    instrumented = instrument(definition, function, trace)
    with subject.recording() as experts:
        called: list[bool] = []

        def once(*args: Any, **kwargs: Any) -> Any:
            chosen = function if called else instrumented
            experts.begin()
            result = chosen(*args, **kwargs)
            if not called:
                experts.end()
                called.append(True)
            return result

        subject.exact(once)
    if not called:
        raise ValueError("the function was not called again on the same input")
    return experts, trace


def _candidates(evidence: Evidence, trace: Trace) -> list[_Candidate]:
    """Best first: most slots per token, then unweighted rows, then earliest."""
    found = [
        (-plan.slots, plan.combine != "none", order, _Candidate(event.number, name, plan))
        for order, event in enumerate(trace.events)
        for name in event.changed()
        for plan in propose(evidence, event.before, event.after[name], name)
    ]
    found.sort(key=lambda item: item[:3])
    return [candidate for *_, candidate in found]


def _try(
    subject: Subject, definition: ast.FunctionDef, function: FunctionType, candidate: _Candidate
) -> Found | Refused:
    failed = _failed_probe(subject, definition, function, candidate)
    if failed:
        return Refused(f"{failed} gives other values than the original", 1)
    plan = _with_dtype(subject, definition, function, candidate)
    tree = copy.deepcopy(definition)
    try:
        _substitute(tree, candidate, plan)
        prune(tree)
        replacement = build(tree, function, {_RUN: run_plan, _PLAN: plan})
    except ValueError as error:
        return Refused(str(error), 1)
    disagreement = subject.disagreement(replacement)
    if disagreement:
        return Refused(disagreement, 2)
    own = in_own_dtypes(subject, plan)
    if own is None:
        return Refused("the experts do something else in the model's own dtypes", 2)
    replacement = build(tree, function, {_RUN: run_plan, _PLAN: own})
    return Found(replacement, own, kept_lines(tree))


def _substitute(tree: ast.FunctionDef, candidate: _Candidate, plan: DispatchPlan) -> None:
    """Put `name = run_plan(plan, self, {..})` in place of the candidate's statement."""
    old = watched(tree)[candidate.number]
    sources = [a for a in (*plan.positional, *(a for _, a in plan.keyword)) if a.name]
    names = sorted(
        {plan.ids, plan.weights, plan.accumulate, plan.dtype_name, *(a.name for a in sources)}
    )
    names = [name for name in names if name]
    owner = (*tree.args.posonlyargs, *tree.args.args)[0].arg
    keys: list[ast.expr | None] = [ast.Constant(name) for name in names]
    loads: list[ast.expr] = [ast.Name(name, ast.Load()) for name in names]
    arguments = [ast.Name(_PLAN, ast.Load()), ast.Name(owner, ast.Load()), ast.Dict(keys, loads)]
    call = ast.Call(ast.Name(_RUN, ast.Load()), list(arguments), [])
    new = ast.copy_location(ast.Assign([ast.Name(candidate.name, ast.Store())], call), old)
    setattr(new, LOST_NAMES, bound_names(old) - {candidate.name})
    setattr(new, REPLACED, True)
    ast.fix_missing_locations(new)
    for node in ast.walk(tree):
        for suite in (getattr(node, "body", None), getattr(node, "orelse", None)):
            if isinstance(suite, list) and any(statement is old for statement in suite):
                suite[[statement is old for statement in suite].index(True)] = new
                return


def _run_traced(
    instrumented: FunctionType,
    function: FunctionType,
    replay: Callable[[Callable[..., Any]], Any],
) -> None:
    """Replay with the first call instrumented and later ones as written."""
    pending = itertools.chain([instrumented], itertools.repeat(function))

    def step(*args: Any, **kwargs: Any) -> Any:
        return next(pending)(*args, **kwargs)

    replay(step)


def _event(trace: Trace, candidate: _Candidate) -> Event | None:
    return next((event for event in trace.events if event.number == candidate.number), None)


def _failed_probe(
    subject: Subject, definition: ast.FunctionDef, function: FunctionType, candidate: _Candidate
) -> str:
    plan = candidate.plan
    names = [name for name, _ in routings(torch.zeros(1, dtype=torch.long), plan.experts)]
    for index, probe in enumerate(names):

        def reroute(ids: Tensor, index: int = index) -> Tensor:
            return list(routings(ids, plan.experts))[index][1]

        overrides: dict[str, Callable[[Tensor], Tensor]] = {plan.ids: reroute}
        if plan.weights:
            overrides[plan.weights] = random_like
        trace = Trace()
        instrumented = instrument(definition, function, trace, overrides)
        try:
            _run_traced(instrumented, function, subject.exact)
        except Exception as error:  # user code may fail in any way on a wrong guess
            return f"{probe}: the original raises {type(error).__name__}, a replacement"
        event = _event(trace, candidate)
        if event is None:
            return f"{probe}: the statement does not run, a replacement"
        with exact_arithmetic(subject.device):
            if not close(_evaluate(subject, plan, event.before), event.after[candidate.name]):
                return probe
    return ""


def _evaluate(subject: Subject, plan: DispatchPlan, values: Mapping[str, Any]) -> Any:
    try:
        return run_plan(plan, subject.copied, values)
    except Exception:  # the plan does not fit these values: it is compared as a mismatch
        return None


def _with_dtype(
    subject: Subject, definition: ast.FunctionDef, function: FunctionType, candidate: _Candidate
) -> DispatchPlan:
    """Name the local whose dtype the result has when the model runs in its own dtypes."""
    if candidate.plan.combine == "none":
        return candidate.plan
    trace = Trace()
    _run_traced(instrument(definition, function, trace), function, subject.native)
    event = _event(trace, candidate)
    if event is None:
        return candidate.plan
    dtypes = {name: v.dtype for name, v in event.before.items() if isinstance(v, Tensor)}
    return choose_dtype(candidate.plan, dtypes, event.after[candidate.name].dtype)
