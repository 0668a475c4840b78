"""Third-party models under the contracts whole, exact, fresh, and in part oracle.

Two entries are compiled a case: one order after the other. What the float64 reference cannot follow
is checked by a budget of 1, which computes everything: then a reuse step is eager.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from compat.case import Case
from compat.cases import CASES
from compat.checks import compile_case, error_of, other_condition, step
from graph_runs import compile_model, watched_call
from moeca_compile import Options
from moeca_compile.debug.compat import compare
from moeca_compile.torch_compat import without_kernels
from reference import Forced, Reference
from reference_choice import ChoiceReference

# What every run pays for; the other cases are slow.
QUICK_ROWS = ("gpt-oss block, eager",)
QUICK_JUDGED: tuple[str, ...] = ()
pytestmark = [  # of the libraries, when they are imported or traced
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
]


def parameters(
    quick: tuple[str, ...] = (), chosen: Callable[[Case], bool] = lambda _: True
) -> list[Any]:
    """The chosen cases as parameters; those outside of `quick` and the checkouts are slow."""
    found = []
    for case in filter(chosen, CASES):
        marks = () if case.name.startswith(quick) or "/" in case.source else (pytest.mark.slow,)
        found.append(pytest.param(case, id=case.name.replace(" ", "_"), marks=marks))
    return found


@pytest.fixture
def without_any_kernels() -> Iterator[None]:
    """Graphs run as they are."""
    with without_kernels():
        yield


@pytest.mark.parametrize("case", parameters(QUICK_ROWS))
def test_row_of_the_table(without_any_kernels: None, case: Case) -> None:
    """One graph, all regions, equal to eager without caching, reuse; or the gap it is known for."""
    model, calls = case.build()
    row = compare(
        case.name,
        model,
        [((), call) for call in calls],
        expected_regions=case.regions,
        options=case.options,
        count_plain=False,
    )
    assert row.max_error is not None, row.reason
    assert row.max_error <= case.tolerance
    assert not row.failed  # explain, among others, went to its end
    if case.gap:
        assert row.reason
        assert not row.good, f"{case.name} works now: take its gap off"
        return
    assert row.good, row
    assert (row.regions_matched, row.graphs_moeca) == (case.regions, 1)


@pytest.mark.parametrize("case", parameters(chosen=lambda c: not c.gap))
def test_whole_exact_and_fresh(without_any_kernels: None, case: Case) -> None:
    model, calls = case.build()
    compiled = compile_case(
        model, calls[0], interval=4, budget=1.0, order="attention_first", **case.options
    )
    kinds = []
    for call in calls[:5]:  # everything is computed: all steps are exact
        ran = step(compiled, call)
        kinds.append(ran.kind)
        assert error_of(ran, model, call) <= case.tolerance
    again = case.captures - 1  # each capture has caches of its own
    assert kinds == (["refresh"] * again + ["refresh", "reuse", "reuse", "reuse", "refresh"])[:5]
    with torch.compiler.set_stance("fail_on_recompile"):
        new = step(compiled, calls[0])  # a generation begins
        other = step(compiled, other_condition(calls[1], case.condition))  # another lane
        assert (new.kind, other.kind) == ("refresh", "refresh")
        assert error_of(new, model, calls[0]) <= case.tolerance


@pytest.mark.parametrize("case", parameters(QUICK_JUDGED, lambda c: bool(c.view) and not c.gap))
def test_reuse_equals_the_reference(without_any_kernels: None, case: Case) -> None:
    model, keyword_calls = case.build()
    calls = [tuple(call.values()) for call in keyword_calls]
    with torch.no_grad():
        model(*calls[0])  # whatever the first forward stores is there: one capture
    options = {"interval": 4, "budget": 0.3}
    reference = judge_of(case, model, Options(**options))
    compiled = compile_model(model, calls[0], **options)
    kinds = []
    for call in calls[:3]:
        ran = watched_call(compiled, *call)
        kinds.append(ran.kind)
        refresh = ran.kind == "refresh"
        chosen = [Forced(*sets) for sets in zip(ran.pairs, ran.attended, ran.shared, strict=True)]
        judge = reference.step(*call, refresh=refresh, forced=None if refresh else chosen)
        if not refresh:
            assert judge.disputed == [set()] * len(ran.pairs)
        output = ran.output if isinstance(ran.output, torch.Tensor) else ran.output[0]
        assert (output.double() - judge.output).norm() / judge.output.norm() <= 1e-5
    assert kinds == ["refresh", "reuse", "reuse"]


def judge_of(case: Case, model: torch.nn.Module, options: Options) -> Reference | ChoiceReference:
    """The float64 reference of the case's routing."""
    assert case.view is not None
    if case.idiom in ("I5", "I7"):
        return ChoiceReference(model, options, pooled=case.idiom == "I7", view=case.view)
    return Reference(model, options, view=case.view)


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("case", [CASES[0]], ids=lambda c: c.name)
def test_with_inductor(case: Case) -> None:
    """End to end through plain torch.compile, as exact as plain Inductor."""
    model, calls = case.build()
    plain, errors = torch.compile(model), [0.0, 0.0]
    with torch.no_grad():
        for call in calls[:2]:
            ran = step(plain, call)
            errors[0] = max(errors[0], error_of(ran, model, call))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="moeca", options={"interval": 2})
    kinds = []
    for call in calls[:5]:
        ran = step(compiled, call)
        kinds.append(ran.kind)
        if ran.kind != "reuse":
            errors[1] = max(errors[1], error_of(ran, model, call))
    assert kinds == ["", "refresh", "reuse", "refresh", "reuse"]
    assert 0 < errors[0] < 1e-4
    assert errors[1] <= 2 * errors[0]
