"""The contracts where experts pick tokens: within a sample (I5, I6), from the whole batch (I7)."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import moeca_compile
from contracts.generations import Call, assert_fresh, assert_reused, difference, run
from graph_runs import compile_model, only_entry, use_graph_level, watched_call
from idioms import make, trajectory
from idioms.denoiser import Denoiser
from moeca_compile import Options
from moeca_compile.passes import run_experts
from reference_choice import ChoiceReference
from reference_state import Forced

EXPERTS, BATCH, TOKENS = 4, 2, 16
CASES = [
    # idiom, expert, shared, attention
    ("I5", "swiglu", 1, "sdpa"),
    ("I6", "mlp", 1, "rope"),
    ("I7", "swiglu", 1, "manual"),
    ("I5", "mlp", 0, "manual"),
    ("I6", "swiglu", 2, "sdpa"),
    ("I7", "mlp", 0, "sdpa"),
]
RULES = [
    {"score": "input_drift", "budget": None},
    {"score": "moeca", "budget": 0.5},
    {"score": "input_drift", "budget": 0.15, "forecast_order": 1},
    {"score": "moeca", "budget": None},
    {"score": "input_drift", "budget": 0.4, "order": "attention_first"},
    {"score": "input_drift", "budget": 0.03},
]


def build(idiom: str, steps: int, depth: int = 1, **choices: object) -> tuple[Denoiser, list[Call]]:
    """A model and the calls of a generation, in bfloat16 where grouped products need it."""
    model = make(idiom, num_experts=EXPERTS, depth=depth, **choices)  # type: ignore[arg-type]
    calls = trajectory(model, steps, dx=0.05)
    if idiom == "I6_grouped":
        return model.bfloat16(), [(x.bfloat16(), t.bfloat16(), y) for x, t, y in calls]
    return model, calls


def _parameters() -> list:
    """Every case with every rule on two layers; without the marker one layer, a rule an idiom."""
    out = []
    for i, case in enumerate(CASES):
        for j, rule in enumerate(RULES):
            quick = i == j and i in (0, 2)
            marks = () if quick else pytest.mark.slow
            name = "-".join(map(str, (*case, *rule.values())))
            out.append(pytest.param(case, rule, 1 if quick else 2, id=name, marks=marks))
    return out


@pytest.mark.parametrize(("case", "rule", "depth"), _parameters())
def test_reuse_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, case: tuple, rule: dict, depth: int
) -> None:
    """Contracts "oracle" and "honest": same branches, same outputs, same counts."""
    use_graph_level(monkeypatch)
    _assert_equals_the_reference(case, rule, depth)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "rule"), [(CASES[1], RULES[2]), (CASES[2], RULES[1])])
def test_experts_one_after_another_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, case: tuple, rule: dict
) -> None:
    """The form that large models get; see passes/run_experts.py."""
    use_graph_level(monkeypatch)
    monkeypatch.setattr(run_experts, "STAYS_IN_CACHE", 0)
    _assert_equals_the_reference(case, rule, depth=1)


def _assert_equals_the_reference(case: tuple, rule: dict, depth: int) -> None:
    idiom, expert, shared, attention = case
    model, calls = build(idiom, 5, depth, expert=expert, shared=shared, attention=attention)
    options = {"policy": "moeca", "interval": 4, **rule}
    reference = ChoiceReference(model, Options(**options), pooled=idiom == "I7")
    compiled = compile_model(model, calls[0], **options)
    kinds, seen = [], Counter()
    for call in calls:
        ran = watched_call(compiled, *call)
        refresh = ran.kind == "refresh"
        forced = [Forced(*sets) for sets in zip(ran.pairs, ran.attended, ran.shared)]
        judge = reference.step(*call, refresh=refresh, forced=None if refresh else forced)
        kinds.append(ran.kind)
        if not refresh:
            assert judge.disputed == [set()] * depth
            assert all(not layer.disputed_tokens for layer in judge.layers)
            seen["tokens"] += sum(len(a) for a in ran.attended)
        for layer in judge.layers:
            new = layer.chosen & ~layer.matched
            seen["branches"] += int(layer.chosen.sum())
            seen["computed"] += int(layer.computed.sum())
            seen["unmatched"] += 0 if refresh else int(new.sum())
            seen["dropped"] += 0 if refresh else int((new & ~layer.computed).sum())
        error = (ran.output.double() - judge.output).norm() / judge.output.norm()
        assert error <= 1e-5
    assert kinds == ["refresh", "reuse", "reuse", "reuse", "refresh"]
    stats = moeca_compile.stats(compiled)
    assert seen["unmatched"] > 0, "no expert changed its mind: lost branches would not show"
    assert (seen["dropped"] > 0) == (rule["budget"] == 0.03)
    assert (stats.branches_total, stats.branches_computed) == (seen["branches"], seen["computed"])
    assert (stats.unmatched, stats.dropped) == (seen["unmatched"], seen["dropped"])
    assert stats.tokens_attended == seen["tokens"] + 2 * depth * BATCH * TOKENS
    assert stats.speedup_flops > 1


@pytest.mark.parametrize(
    "idiom",
    ["I5", *(pytest.param(i, marks=pytest.mark.slow) for i in ("I6", "I6_grouped", "I7"))],
)
def test_caching_off_and_every_refresh_equal_eager(graph_level: None, idiom: str) -> None:
    model, calls = build(idiom, 2, expert="swiglu")
    tolerance = 2e-2 if idiom == "I6_grouped" else 1e-5  # bfloat16: a few roundings of 2^-8
    for options in ({"interval": 1}, {"interval": 8, "warmup_steps": 2}):
        compiled = compile_model(model, calls[0], **options)
        for call in calls:
            ran = run(compiled, *call)
            assert ran.kind == ("plain" if options["interval"] == 1 else "refresh")
            assert difference(ran.output, model, *call) <= tolerance
        stats = moeca_compile.stats(compiled)
        assert stats.branches_computed == stats.branches_total > 0
        assert stats.flops_computed == stats.flops_full > 0


@pytest.mark.slow
@pytest.mark.parametrize("idiom", ["I5", "I6", "I6_grouped", "I7"])
def test_bytes_are_known_and_are_those_of_the_branches(graph_level: None, idiom: str) -> None:
    """Contract "bounded". Picks within a sample keep one row a place, a pool one of every pair."""
    model, calls = build(idiom, 7, expert="swiglu")
    compiled = compile_model(model, calls[0], interval=4)
    planned = moeca_compile.explain(compiled, *calls[0]).cache_bytes
    kinds = [run(compiled, *call).kind for call in calls]
    assert kinds == ["refresh", "reuse", "reuse", "reuse", "refresh", "reuse", "reuse"]
    assert moeca_compile.stats(compiled).cache_bytes == planned
    layout = only_entry(compiled).variants.analysis.plan.layout
    capacity = 2 * TOKENS // EXPERTS  # `choice_capacity` 2
    rows = BATCH * TOKENS * EXPERTS if idiom == "I7" else BATCH * EXPERTS * capacity
    size = 2 if idiom == "I6_grouped" else 4
    assert layout.nbytes_by_kind()["branch"] == (rows + 1) * 32 * size


@pytest.fixture
def pool(graph_level: None) -> tuple[Denoiser, object, list[Call]]:
    """Two samples of one class, two calls into a generation; `calls[2]` would be a reuse step."""
    model, calls = build("I7", 6)
    calls = [(x, t, torch.full_like(y, 3)) for x, t, y in calls]
    compiled = compile_model(model, calls[0], interval=8)
    assert run(compiled, *calls[0]).kind == "refresh"
    assert_reused(run(compiled, *calls[1]), model, *calls[1])
    return model, compiled, calls


@pytest.mark.slow
@pytest.mark.parametrize("change", ["permuted", "replaced", "relabelled", "generation", "weights"])
def test_another_batch_never_reads_old_rows(pool: tuple, change: str) -> None:
    """Contract "fresh": what one sample's experts pick depends on its batch mates."""
    model, compiled, calls = pool
    x, t, y = calls[2]
    if change == "permuted":
        x = x.flip(0)
    elif change == "replaced":
        x = torch.cat([x[:1], trajectory(model, 1, seed=9)[0][0][:1]])
    elif change == "relabelled":
        y = torch.tensor([3, 4])
    elif change == "generation":
        x, t, y = calls[0]
    else:
        with torch.no_grad():
            model.blocks[0].moe.experts[1].up.weight.mul_(1.5)
    assert_fresh(run(compiled, x, t, y), model, x, t, y)


@pytest.mark.slow
def test_lanes_of_a_pool_do_not_mix(pool: tuple) -> None:
    model, compiled, calls = pool
    null = torch.full_like(calls[0][2], 10)
    together = [run(compiled, x, t, labels) for x, t, y in calls[2:] for labels in (y, null)]
    assert [r.kind for r in together] == ["reuse", "refresh", *["reuse"] * 6]
    moeca_compile.reset(compiled)
    alone = [run(compiled, *call).output for call in calls]
    torch.testing.assert_close(together[-2].output, alone[-1], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("idiom", ["I5", "I6", "I6_grouped", "I7"])
def test_with_inductor_nothing_is_compiled_after_the_first_steps(
    monkeypatch: pytest.MonkeyPatch, idiom: str
) -> None:
    """Contract "whole", and the outputs of Inductor's kernels are those of the lowered graphs."""
    model, calls = build(idiom, 6, expert="swiglu")
    compiled = compile_model(model, calls[0], interval=4)
    ran = [run(compiled, *call) for call in calls[:2]]
    with torch.compiler.set_stance("fail_on_recompile"):
        ran += [run(compiled, *call) for call in calls[2:]]
    assert [r.kind for r in ran] == ["refresh", "reuse", "reuse", "reuse", "refresh", "reuse"]
    torch._dynamo.reset()
    use_graph_level(monkeypatch)
    lowered = compile_model(model, calls[0], interval=4)
    tolerance = 5e-2 if idiom == "I6_grouped" else 1e-4
    for call, fast in zip(calls[:2], ran):
        slow = run(lowered, *call).output.double()
        assert (fast.output.double() - slow).norm() <= tolerance * slow.norm()
