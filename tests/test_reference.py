"""The reference itself: what must hold of it whatever the options are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.fashion_ditmoe.model import load_model
from idioms import DISPATCHES, EXPERT_CHOICE, inputs, make, trajectory
from reference import Forced, Reference, ReferenceOptions

FASHION = Path(__file__).parents[1] / "examples" / "fashion_ditmoe"
SCORES = ["moeca", "input_drift"]
EXACT = {"rtol": 1e-11, "atol": 1e-11}


# --- the step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "manual", "rope"])
# The reference knows token choice only: expert choice is never cached.
@pytest.mark.parametrize(
    "idiom", sorted(set(DISPATCHES) - {"I9", "I1_capacity"} - set(EXPERT_CHOICE))
)
def test_refresh_equals_the_float64_model(idiom: str, attention: str) -> None:
    model = make(idiom, router="sigmoid", attention=attention, shared=2)
    step = Reference(model).step(*inputs(model), refresh=True)
    x, t, y = inputs(model)
    torch.testing.assert_close(step.output, model.double()(x.double(), t.double(), y), **EXACT)


def test_refresh_equals_the_fashion_model() -> None:
    model = load_model(FASHION)
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    t, y = torch.full((2,), 0.7), torch.tensor([3, 10])
    step = Reference(model).step(x, t, y, refresh=True)
    torch.testing.assert_close(step.output, model(x, t, y).double(), rtol=1e-4, atol=1e-4)
    assert step.output.std() > 0.1


@pytest.mark.parametrize("score", SCORES)
def test_reuse_steps_of_the_trained_model_stay_close_and_skip_work(score: str) -> None:
    model = load_model(FASHION)
    ref = Reference(model, ReferenceOptions(score=score))
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([3, 10])
    for index in range(4):  # Euler steps of a 50-step sampler
        t = torch.full((2,), 1.0 - index / 50)
        step = ref.step(x, t, y, refresh=index == 0)
        exact = model(x, t, y)
        error = (step.output - exact).norm() / exact.norm()
        if index:
            assert 1e-4 < error < 0.1
            assert all(not layer.computed.all() for layer in step.layers)
            assert any(layer.computed.any() for layer in step.layers)
        x = x - exact.detach() / 50


@pytest.mark.parametrize("score", SCORES)
def test_nothing_is_stale_when_everything_is_computed_from_layer_one(score: str) -> None:
    """With one layer and tau < 0 only the router's input is stale, here by the attention rows.

    The same routing on both sides leaves no difference at all.
    """
    model = make("I1", depth=1)
    ref = Reference(model, ReferenceOptions(tau=-1.0, score=score))
    first, second = trajectory(model, 2, dx=0.02)
    ref.step(*first, refresh=True)
    step = ref.step(*second, refresh=False)
    layer = step.layers[0]
    assert layer.computed.all()
    fresh = Reference(model)
    exact = fresh.step(*second, refresh=True)
    torch.testing.assert_close(layer.state.attn, exact.layers[0].state.attn, **EXACT)
    torch.testing.assert_close(layer.state.token_in, exact.layers[0].state.token_in, **EXACT)
    torch.testing.assert_close(layer.state.shared, exact.layers[0].state.shared, **EXACT)
    rows = torch.zeros_like(layer.state.shared)
    for token, (ids, weights) in enumerate(zip(layer.ids.tolist(), layer.weights)):
        for expert, weight in zip(ids, weights):
            one = ref.view.blocks[0].expert(expert, layer.state.token_in[token : token + 1])
            rows[token] += weight * one[0]
    c = ref.view.embed(second[0].double(), second[1], second[2])[1]
    h, _ = ref.view.embed(second[0].double(), second[1], second[2])
    h = ref.view.blocks[0].add_attention(h, layer.state.attn, c)
    h = ref.view.blocks[0].add_experts(h, rows + layer.state.shared, c)
    torch.testing.assert_close(step.output, ref.view.finish(h, c), **EXACT)


@pytest.mark.parametrize("order", ["router_first", "attention_first"])
@pytest.mark.parametrize("score", SCORES)
def test_full_budget_is_a_refresh_but_for_the_router_input(score: str, order: str) -> None:
    model = make("split", router="softmax_renorm")
    options = ReferenceOptions(budget=1.0, score=score, order=order)
    ref = Reference(model, options)
    calls = trajectory(model, 3)
    ref.step(*calls[0], refresh=True)
    for call in calls[1:]:
        step = ref.step(*call, refresh=False)
        exact = Reference(model).step(*call, refresh=True)
        assert all(layer.computed.all() for layer in step.layers)
        assert all(layer.tokens_attended.all() for layer in step.layers)
        if order == "attention_first":  # every row fresh before the router: a true refresh
            torch.testing.assert_close(step.output, exact.output, **EXACT)
            continue
        # Layer one has fresh attention and inputs; only its router saw the older attention.
        torch.testing.assert_close(
            step.layers[0].state.token_in, exact.layers[0].state.token_in, **EXACT
        )
        assert not torch.allclose(step.output, exact.output)


@pytest.mark.parametrize(
    ("order", "budget"),
    [
        ("router_first", None),
        ("router_first", 0.1),
        ("router_first", 0.5),
        ("attention_first", 0.1),
        ("attention_first", 0.5),
    ],
)
@pytest.mark.parametrize("score", SCORES)
def test_identical_inputs_change_nothing(score: str, order: str, budget: float | None) -> None:
    model = make("I2", router="sigmoid", attention="rope")
    ref = Reference(model, ReferenceOptions(score=score, budget=budget, order=order))
    call = inputs(model)
    first = ref.step(*call, refresh=True)
    for _ in range(3):
        again = ref.step(*call, refresh=False)
        assert all(layer.matched.all() for layer in again.layers)
        torch.testing.assert_close(again.output, first.output, **EXACT)


def test_input_drift_computes_nothing_on_identical_inputs() -> None:
    model = make("I1")
    ref = Reference(model, ReferenceOptions(score="input_drift"))
    ref.step(*inputs(model), refresh=True)
    step = ref.step(*inputs(model), refresh=False)
    assert [layer.pairs for layer in step.layers] == [set(), set()]
    assert not any(layer.tokens_attended.any() for layer in step.layers)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_threshold_computes_every_unmatched_branch_and_reuses_some(score: str, top_k: int) -> None:
    model = make("I8", top_k=top_k, expert="swiglu")
    ref = Reference(model, ReferenceOptions(score=score))
    calls = trajectory(model, 4, dx=0.4)
    ref.step(*calls[0], refresh=True)
    unmatched = reused = 0
    for call in calls[1:]:
        for layer in ref.step(*call, refresh=False).layers:
            assert layer.computed[~layer.matched].all()
            assert not layer.dropped.any()
            assert torch.equal(layer.tokens_attended, layer.computed.any(1))
            unmatched += int((~layer.matched).sum())
            reused += int((~layer.computed).sum())
    assert unmatched > 0 and reused > 0


def test_reused_branches_keep_their_rows_and_untouched_tokens_all_of_their_state() -> None:
    model = make("split")
    ref = Reference(model, ReferenceOptions(score="input_drift", budget=0.2))
    calls = trajectory(model, 3)
    before = ref.step(*calls[0], refresh=True)
    for call in calls[1:]:
        after = ref.step(*call, refresh=False)
        for old_layer, layer in zip(before.layers, after.layers):
            old, new = old_layer.state, layer.state
            idle = ~layer.tokens_attended
            assert idle.any() and layer.tokens_attended.any()
            assert torch.equal(new.slot_out[~layer.computed], old.slot_out[~layer.computed])
            for name in ("slot_ids", "slot_weight", "slot_norm", "slot_drift", "token_in"):
                assert torch.equal(getattr(new, name)[idle], getattr(old, name)[idle]), name
            assert torch.equal(new.shared[idle], old.shared[idle])
            shape = (2, 16)
            rows = idle.view(shape)
            assert torch.equal(new.attn[rows], old.attn[rows])
            assert torch.equal(new.k.transpose(1, 2)[rows], old.k.transpose(1, 2)[rows])
            assert (new.slot_drift[layer.computed] == 0).all()
            kept = layer.tokens_attended[:, None] & ~layer.computed
            assert (new.slot_drift[kept] > old.slot_drift[kept]).all()
        before = after


def test_budget_counts_per_sample_and_drops_what_does_not_fit() -> None:
    model = make("I1", top_k=2)
    ref = Reference(model, ReferenceOptions(budget=0.1))
    far = trajectory(model, 2, dx=3.0)  # so far apart that many tokens change their experts
    ref.step(*far[0], refresh=True)
    step = ref.step(*far[1], refresh=False)
    dropped = 0
    for layer in step.layers:
        assert layer.computed.view(2, -1).sum(1).tolist() == [4, 4]  # ceil(0.1 * 16 * 2)
        assert torch.equal(layer.dropped, ~layer.matched & ~layer.computed)
        dropped += int(layer.dropped.sum())
    assert dropped > 0


def test_lanes_do_not_share_state() -> None:
    model = make("I1")
    ref, alone = Reference(model), Reference(model)
    calls, others = trajectory(model, 3), trajectory(model, 3, seed=7)
    for index, (call, other) in enumerate(zip(calls, others)):
        ref.step(*other, refresh=index == 0, lane="unconditional")
        mixed = ref.step(*call, refresh=index == 0, lane="conditional")
        single = alone.step(*call, refresh=index == 0)
        assert torch.equal(mixed.output, single.output)


# --- a selection fed in ------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 0.25])
def test_feeding_the_own_selection_changes_nothing(budget: float | None) -> None:
    model = make("I1")
    options = ReferenceOptions(budget=budget)
    free, fed = Reference(model, options), Reference(model, options)
    calls = trajectory(model, 3)
    free.step(*calls[0], refresh=True)
    fed.step(*calls[0], refresh=True)
    for call in calls[1:]:
        own = free.step(*call, refresh=False)
        forced = fed.step(*call, refresh=False, forced=[layer.pairs for layer in own.layers])
        assert torch.equal(forced.output, own.output)
        assert forced.disputed == [set(), set()]


def test_a_wrong_selection_is_disputed_and_a_near_tie_is_not() -> None:
    model = make("I1")
    calls = trajectory(model, 2)
    free = Reference(model)
    free.step(*calls[0], refresh=True)
    own = free.step(*calls[1], refresh=False).layers
    scored = own[0].matched & own[0].computed
    token, slot = scored.nonzero()[0].tolist()
    left_out = (token, int(own[0].ids[token, slot]))
    for tolerance, disputed in ((1e-6, {left_out}), (10.0, set())):
        ref = Reference(model, tolerance=tolerance)
        ref.step(*calls[0], refresh=True)
        fed = ref.step(*calls[1], refresh=False, forced=[own[0].pairs - {left_out}, own[1].pairs])
        assert fed.disputed[0] == disputed
        assert fed.layers[0].pairs == own[0].pairs - {left_out}


def test_an_expert_the_token_did_not_choose_is_disputed() -> None:
    model = make("I1", depth=1)
    ref = Reference(model, tolerance=10.0)
    calls = trajectory(model, 2)
    ref.step(*calls[0], refresh=True)
    chosen = ref.lanes[None].layers[0].slot_ids[0].tolist()
    stranger = (0, min(set(range(8)) - set(chosen)))
    fed = ref.step(*calls[0], refresh=False, forced=[{stranger}])
    assert stranger in fed.disputed[0]
    assert not fed.layers[0].computed.any()


def test_token_choices_of_attention_first_can_be_fed_and_judged() -> None:
    model = make("I1", depth=1)
    ref = Reference(model, ReferenceOptions(budget=0.25, order="attention_first"))
    calls = trajectory(model, 2)
    ref.step(*calls[0], refresh=True)
    before = ref.lanes[None].layers[0]
    own = ref.step(*calls[1], refresh=False).layers[0]
    assert own.tokens_attended.view(2, -1).sum(1).tolist() == [4, 4]
    ref.lanes[None].layers[0] = before
    attended = set(own.tokens_attended.nonzero().flatten().tolist())
    other = (attended - {min(attended)}) | {min(set(range(16)) - attended)}
    fed = ref.step(*calls[1], refresh=False, forced=[Forced(own.pairs, attended=other)]).layers[0]
    assert fed.disputed_tokens == attended ^ other
    assert set(fed.tokens_attended.nonzero().flatten().tolist()) == other


def test_misuse_is_refused() -> None:
    model = make("I1")
    ref = Reference(model)
    with pytest.raises(ValueError, match="first step"):
        ref.step(*inputs(model), refresh=False)
    with pytest.raises(ValueError, match="forced"):
        ref.step(*inputs(model), refresh=True, forced=[set(), set()])
    with pytest.raises(TypeError, match="no reference view"):
        Reference(torch.nn.Linear(2, 2))
