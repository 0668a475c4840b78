"""Contract "oracle": a reuse step equals the float64 reference fed with the same cache.

Same selected branches (near ties of the selection rule excepted) and outputs within float32
rounding, for both scores, threshold and budget, on every idiom.
"""

from __future__ import annotations

import pytest
import torch

from graph_runs import compile_model, use_graph_level, watched_call
from idioms import make, trajectory
from moeca_compile import Options
from reference import Reference

CASES = [
    # idiom, router, expert, top_k, shared, attention
    ("split", "softmax", "swiglu", 2, 1, "sdpa"),
    ("I1", "softmax", "mlp", 1, 0, "sdpa"),
    ("I1", "softmax", "swiglu", 2, 1, "manual"),
    ("I1", "sigmoid", "mlp", 4, 2, "rope"),
    ("I2", "sigmoid", "swiglu", 4, 1, "sdpa"),
    ("I8", "softmax_renorm", "swiglu", 2, 1, "rope"),
    ("I8", "topk_softmax", "mlp", 4, 0, "manual"),
]
RULES = [{"budget": None}, {"budget": 0.15}, {"budget": 0.5}]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"budget-{r['budget']}")
@pytest.mark.parametrize("score", ["moeca", "input_drift"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_reuse_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, case: tuple, score: str, rule: dict
) -> None:
    use_graph_level(monkeypatch)
    idiom, router, expert, top_k, shared, attention = case
    model = make(
        idiom, router=router, expert=expert, top_k=top_k, shared=shared, attention=attention
    )
    calls = trajectory(model, 5, dx=0.05)
    options = {"interval": 4, "score": score, **rule}
    reference = Reference(model, Options(**options))
    compiled = compile_model(model, calls[0], **options)
    kinds = []
    for call in calls:
        step = watched_call(compiled, *call)
        refresh = step.kind == "refresh"
        judge = reference.step(*call, refresh=refresh, forced=None if refresh else step.pairs)
        kinds.append(step.kind)
        if not refresh:
            assert judge.disputed == [set()] * len(step.pairs)
            attended = [{token for token, _ in pairs} for pairs in step.pairs]
            assert step.attended == attended
        error = (step.output.double() - judge.output).norm() / judge.output.norm()
        assert error <= 1e-5
    assert kinds == ["refresh", "reuse", "reuse", "reuse", "refresh"]
