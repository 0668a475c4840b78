"""What a step says about the error of reuse, against the reference; who reads it, and when."""

from __future__ import annotations

import pytest
import torch

import moeca_compile
from graph_runs import compile_model, only_entry, watched_call
from idioms import make, trajectory
from moeca_compile import Options
from reference import Forced, Reference
from reference_rows import cached_slots
from reference_select import relative_drift, token_share


@pytest.mark.parametrize("order", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_evidence_equals_the_reference(graph_level: None, order: int) -> None:
    model = make("I1", depth=1, top_k=2)
    calls = trajectory(model, 7, dx=0.05)
    options = {
        "policy": "moeca", "score": "moeca", "forecast_order": order, "budget": 0.2,
        "tolerance": 100.0, "max_interval": 3,
    }  # fmt: skip
    reference = Reference(model, Options(**options))
    compiled = compile_model(model, calls[0], **options)
    block = reference.view.blocks[0]
    for index, (x, t, y) in enumerate(calls):
        old = reference.lanes[None].layers[0] if index else None
        step = watched_call(compiled, x, t, y)
        refresh = index % 3 == 0
        forced = [Forced(*sets) for sets in zip(step.pairs, step.attended, step.shared)]
        layer = reference.step(x, t, y, refresh=refresh, forced=None if refresh else forced).layers[
            0
        ]
        if old is None:
            continue
        found = only_entry(compiled)._measured[0]
        share, state = token_share(layer.weights), layer.state
        if refresh:
            slot, same = cached_slots(old.slot_ids, layer.ids)
            would = old.rows["slot_out"].picked(slot).at(float(t[0]))
            weight = torch.where(same, share, 0.0)
            off = (state.slot_out - would).norm(dim=-1)
            error = (weight * off).norm() / (weight * state.slot_norm).norm()
            moved = relative_drift(state.token_in, old.token_in)[:, None]
            importance = share * state.slot_norm
            drift = (importance * moved).sum() / importance.sum()
            assert error > 1e-2
        else:
            h, c = reference.view.embed(x.double(), t, y)
            u = block.expert_input(block.add_attention(h, old.rows["attn"].at(float(t[0])), c), c)
            same, error = layer.matched, torch.tensor(0.0)
            moved = relative_drift(u, old.token_in)[:, None] + old.slot_drift
            importance = torch.where(same, share * state.slot_norm, 0.0)
            drift = torch.where(layer.computed, 0.0, importance * moved).sum() / importance.sum()
        switched = torch.where(same, 0.0, share).sum(1).mean()
        expected = torch.stack([drift, switched, error.double()])
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
        assert drift > 1e-2


def test_no_evidence_where_nobody_steers_by_it(graph_level: None) -> None:
    model = make("I1", depth=1)
    calls = trajectory(model, 3)
    compiled = compile_model(model, calls[0], policy="moeca")
    for call in calls:
        watched_call(compiled, *call)
    assert only_entry(compiled)._measured == {}


@pytest.mark.slow
def test_a_tight_tolerance_refreshes_early(graph_level: None) -> None:
    model = make("I1", depth=1)
    calls = trajectory(model, 10, dx=0.05)
    seen = {}
    for tolerance in (1e-4, 0.1, 100.0):
        compiled = compile_model(
            model, calls[0], policy="moeca", tolerance=tolerance, max_interval=5
        )
        for call in calls:
            watched_call(compiled, *call)
        stats = moeca_compile.stats(compiled)
        seen[tolerance] = stats.refresh_steps
        assert stats.reasons["evidence"] + stats.reasons["interval"] == stats.refresh_steps - 1
    assert seen[1e-4] > seen[0.1] > seen[100.0] == 2
