"""Capture by replacing a whole method whose return value is the dispatch itself.

before:  self.moe_infer(x [T, D], flat_ids [T*K], flat_weights [T*K, 1])   loops on the host
after:   run_plan(plan, self, {"x": x, ..})                                one traceable graph
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .plan import DispatchPlan, run_plan
from .propose import propose
from .recorder import ExpertRecord
from .replay import close
from .sandbox import copy_arguments, exact_arithmetic
from .subject import Subject

_MAX_CANDIDATES = 24


@dataclass(frozen=True)
class Found:
    """A replacement that passed every check: a plain function that takes the owner first.

    plan: None if no dispatch was replaced; kept_lines: lines of the original that still run.
    """

    replacement: Callable[..., Any]
    plan: DispatchPlan | None
    kept_lines: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Refused:
    """Why no replacement was found; progress: 0 nothing recognised, 1 a probe, 2 the module."""

    reason: str
    progress: int = 0


def capture_method(subject: Subject) -> Found | Refused:
    """Replace the method by a canonical dispatch, if its return value is one."""
    names, defaults = _parameters(subject)
    if not names:
        return Refused("the method takes *args: its values cannot be named")
    values, result, record = _record(subject, names, defaults)
    refused = Refused("the return value is no selection or weighted sum of expert outputs")
    for plan in _plans(subject, record, values, result):
        failed = _failed_probe(subject, plan, values)
        if failed:
            refused = Refused(f"{failed} gives other values than the original", 1)
            continue
        finished = _with_dtype(subject, plan, names, defaults)
        disagreement = subject.disagreement(make_method(finished, names, defaults))
        if disagreement:
            refused = Refused(disagreement, 2)
            continue
        own = in_own_dtypes(subject, finished)
        if own is not None:
            return Found(make_method(own, names, defaults), own)
        refused = Refused("the experts do something else in the model's own dtypes", 2)
    return refused


def _plans(
    subject: Subject, record: ExpertRecord, values: dict[str, Any], result: Any
) -> list[DispatchPlan]:
    """Plans that reproduce the recorded call, likeliest first."""
    with exact_arithmetic(subject.device):
        proposed = itertools.chain.from_iterable(
            propose(evidence, values, result)
            for evidence in record.evidences(subject.copied, subject.bank_path)
        )
        return list(itertools.islice(proposed, _MAX_CANDIDATES))


def make_method(
    plan: DispatchPlan, names: tuple[str, ...], defaults: tuple[tuple[str, Any], ...]
) -> Callable[..., Any]:
    """The canonical dispatch as a method with parameters `names`."""

    def dispatch(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        values = dict(defaults)
        values.update(zip(names, args))
        values.update(kwargs)
        return run_plan(plan, self, values)

    return dispatch


def _parameters(subject: Subject) -> tuple[tuple[str, ...], tuple[tuple[str, Any], ...]]:
    parameters = list(inspect.signature(subject.method.function).parameters.values())[1:]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return (), ()
    defaults = tuple((p.name, p.default) for p in parameters if p.default is not p.empty)
    return tuple(p.name for p in parameters), defaults


def _bind(
    names: tuple[str, ...], defaults: tuple[tuple[str, Any], ...], args: Any, kwargs: Any
) -> dict[str, Any]:
    return {**dict(defaults), **dict(zip(names, args)), **kwargs}


def _record(
    subject: Subject, names: tuple[str, ...], defaults: tuple[tuple[str, Any], ...]
) -> tuple[dict[str, Any], Any, ExpertRecord]:
    """Arguments and result of the first call of the method while the owner's copy is replayed."""
    seen: list[tuple[dict[str, Any], Any]] = []
    with subject.recording() as experts:

        def record(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            values = _bind(names, defaults, *copy_arguments((args, kwargs)))
            experts.begin()
            result = MethodType(subject.method.declared, self)(*args, **kwargs)
            if not seen:
                experts.end()
                seen.append((values, copy_arguments(result)))
            return result

        subject.exact(record)
    if not seen:
        raise ValueError("the method was not called again on the same input")
    return *seen[0], experts


def routings(ids: Tensor, experts: int) -> Iterator[tuple[str, Tensor]]:
    """Expert numbers that a dispatch must handle: random, all on one expert, on two experts."""
    generator = torch.Generator().manual_seed(1)

    def draw(high: int) -> Tensor:
        return torch.randint(0, high, ids.shape, generator=generator).to(ids)

    yield "random routing", draw(experts)
    yield "everything on one expert", torch.full_like(ids, experts - 1)
    yield "only two experts", draw(2) * (experts - 1)


def random_like(weights: Tensor) -> Tensor:
    """Positive random weights of the same shape and dtype."""
    generator = torch.Generator().manual_seed(2)
    return (torch.rand(weights.shape, generator=generator) + 0.1).to(weights)


def _failed_probe(subject: Subject, plan: DispatchPlan, values: Mapping[str, Any]) -> str:
    owner = subject.copied
    with exact_arithmetic(subject.device):
        for name, ids in routings(values[plan.ids], plan.experts):
            changed = {**values, plan.ids: ids}
            if plan.weights:
                changed[plan.weights] = random_like(values[plan.weights])
            try:
                expected = MethodType(subject.method.declared, owner)(**copy_arguments(changed))
            except Exception as error:  # user code may fail in any way on a wrong guess
                return f"{name}: the original raises {type(error).__name__}, a replacement"
            if not close(run_plan(plan, owner, changed), expected):
                return name
    return ""


def _with_dtype(
    subject: Subject,
    plan: DispatchPlan,
    names: tuple[str, ...],
    defaults: tuple[tuple[str, Any], ...],
) -> DispatchPlan:
    """Name the argument whose dtype the original's result has, in the model's own dtypes."""
    dtypes: dict[str, torch.dtype] = {}
    found: list[torch.dtype] = []

    def record(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        values = _bind(names, defaults, args, kwargs)
        dtypes.update({n: v.dtype for n, v in values.items() if isinstance(v, Tensor)})
        result = MethodType(subject.method.declared, self)(*args, **kwargs)
        found.append(result.dtype)
        return result

    subject.native(record)
    return choose_dtype(plan, dtypes, found[0])


def in_own_dtypes(subject: Subject, plan: DispatchPlan) -> DispatchPlan | None:
    """`plan` with its template learned anew where the checks ran in another dtype.

    A body has dtypes as constants. None if the model runs another body in its own dtypes.
    """
    if plan.template is None or subject.is_exact:
        return plan
    with subject.native_recording() as record:

        def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            record.begin()
            result = MethodType(subject.method.declared, self)(*args, **kwargs)
            record.end()
            return result

        subject.native(run)
    with torch.no_grad():
        learned = record.same_body(plan.template)
    return replace(plan, template=learned.template) if learned is not None else None


def choose_dtype(
    plan: DispatchPlan, dtypes: Mapping[str, torch.dtype], result: torch.dtype
) -> DispatchPlan:
    """`plan` with the local whose dtype equals the result's, rows first; unchanged if none does."""
    if plan.combine == "none":
        return plan
    preferred = (plan.rows_argument.name, plan.weights, *dtypes)
    name = next((n for n in preferred if n and dtypes.get(n) == result), "")
    return replace(plan, dtype_name=name)
