"""The idioms themselves: one function through every dispatch, nothing silent."""

from __future__ import annotations

import pytest
import torch

from idioms import ATTENTIONS, EXPERTS, ROUTERS, inputs, make, trajectory
from idioms.denoiser import Denoiser

MODULE_LISTS = ["I1", "split", "I2", "I3"]
STACKED = ["I8", "I9"]


def output(model: Denoiser, seed: int = 1) -> torch.Tensor:
    return model(*inputs(model, seed=seed))


@pytest.mark.parametrize("expert", sorted(EXPERTS))
@pytest.mark.parametrize("router", sorted(ROUTERS))
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_dispatches_of_the_same_weights_agree(router: str, expert: str, top_k: int) -> None:
    for family in (MODULE_LISTS, STACKED):
        outputs = [output(make(i, router=router, expert=expert, top_k=top_k)) for i in family]
        for other in outputs[1:]:
            torch.testing.assert_close(other, outputs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", sorted(ATTENTIONS))
def test_every_parameter_matters(attention: str) -> None:
    model = make("split", router="sigmoid", attention=attention, shared=2)
    model.requires_grad_(True)
    output(model).square().sum().backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # A few experts may have no token, and softmax attention ignores a constant added to its keys.
    silent = {n for n in silent if ".experts." not in n}
    assert silent == set()


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_routing_differs_between_tokens(router: str) -> None:
    model = make("I1", router=router)
    rows = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    _, ids = model.blocks[0].moe.router(rows)
    assert len(ids.unique()) >= 4
    assert all(len(set(row)) == 2 for row in ids.tolist())


def test_sigmoid_weights_are_unbiased_renormalised_and_scaled() -> None:
    router = make("I1", router="sigmoid").blocks[0].moe.router
    rows = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    weights, ids = router(rows)
    torch.testing.assert_close(weights.sum(1), torch.full((64,), 2.5))
    scores = router.logits(rows).sigmoid()
    picked = scores.gather(1, ids)
    torch.testing.assert_close(weights[:, 0] / weights[:, 1], picked[:, 0] / picked[:, 1])
    unbiased = scores.topk(2)[1].sort(1)[0]
    assert (unbiased != ids.sort(1)[0]).any(), "the bias must change some choice"


def test_shared_experts_add_up() -> None:
    outputs = [output(make("I1", shared=count)) for count in (0, 1, 2)]
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])


def test_capacity_drops_rows_only_when_an_expert_is_crowded() -> None:
    plain, capped = make("I1"), make("I1_capacity")
    torch.testing.assert_close(output(plain), output(capped))
    rows = torch.ones(1, 16, 32)  # every token alike: all go to the same experts
    assert not torch.allclose(plain.blocks[0].moe(rows), capped.blocks[0].moe(rows))


def test_unlabelled_samples_go_to_an_expert_of_their_own() -> None:
    model = make("I4", depth=1)
    moe, y = model.blocks[0].moe, inputs(model)[2]
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    weights, ids = moe.assign(x, y)
    assert (ids[16:] == 7).all() and (ids[:16] < 7).all()
    assert weights[16:].tolist() == [[1.0, 0.0]] * 16
    rows = x.flatten(0, 1)
    used, distinct = moe.route(rows, y)
    every = torch.stack([moe.one_expert(e, rows) for e in range(8)], dim=1)  # [T, E, D]
    picked = every.gather(1, distinct[..., None].expand(-1, -1, 32))
    expected = (picked * used[..., None]).sum(1) + moe.shared_rows(rows)
    torch.testing.assert_close(moe(x, y).flatten(0, 1), expected)


def test_expert_choice_spellings_agree() -> None:
    """I6 is I5 with gates renormalised per token; grouped products are a loop over experts."""
    plain, indexed = make("I5", shared=0, depth=1).blocks[0].moe, make("I6", shared=0, depth=1)
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    gates, tokens = plain.choose(x)
    total = torch.zeros(2, 16).scatter_add(1, tokens.flatten(1), gates.flatten(1))
    expected = plain(x) / (total[..., None] + 1e-12) * 2.5
    torch.testing.assert_close(indexed.blocks[0].moe(x), expected)
    stacked = make("I6_grouped", expert="swiglu", depth=1).blocks[0].moe
    rows = torch.randn(8 * 4, 32, generator=torch.Generator().manual_seed(1))
    each = [stacked.one_expert(e, part) for e, part in enumerate(rows.split(4))]
    torch.testing.assert_close(stacked.run_experts(rows, 4), torch.cat(each))


def test_batch_mates_matter_in_a_pool_only() -> None:
    for idiom, moved in (("I5", False), ("I7", True)):
        model = make(idiom, depth=1)
        moe = model.blocks[0].moe
        x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
        alone, together = moe(x[:1]), moe(torch.cat([x[:1], 3 * x[1:]]))[:1]
        assert torch.allclose(alone, together, atol=1e-5) is not moved


def test_trajectory_keeps_the_conditioning_and_lowers_t() -> None:
    model = make("I1")
    calls = trajectory(model, steps=4)
    times = [float(t[0]) for _, t, _ in calls]
    assert times == sorted(times, reverse=True)
    assert all(torch.equal(y, calls[0][2]) for _, _, y in calls)
    assert not torch.equal(calls[0][0], calls[1][0])


def test_unknown_names_and_sizes_are_refused() -> None:
    with pytest.raises(KeyError, match="unknown 'I99'"):
        make("I99")
    with pytest.raises(ValueError, match="square"):
        make("I1", tokens=15)
    with pytest.raises(ValueError, match="top_k"):
        make("I1", top_k=9)
