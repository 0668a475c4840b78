"""Both scores of the reference, written out a second time with Python numbers."""

from __future__ import annotations

import math

import pytest
import torch

from idioms import make, trajectory
from reference import Reference, ReferenceOptions


def test_input_drift_score_is_share_times_norm_times_drift() -> None:
    model = make("I1", depth=1, top_k=2)
    ref = Reference(model, ReferenceOptions(score="input_drift", tau=1e9))
    calls = trajectory(model, 2, dx=0.02)
    first = ref.step(*calls[0], refresh=True).layers[0]
    x, t, y = calls[1]
    h, c = ref.view.embed(x.double(), t, y)
    block = ref.view.blocks[0]
    u = block.expert_input(block.add_attention(h, first.state.attn, c), c)
    layer = ref.step(*calls[1], refresh=False).layers[0]
    token, slot = 3, 0
    assert layer.matched[token, slot]
    raw = []
    for row in range(16):
        moved = math.dist(u[row].tolist(), first.state.token_in[row].tolist())
        drift = moved / math.hypot(*first.state.token_in[row].tolist())
        for j in range(2):
            if layer.matched[row, j]:
                share = float(layer.weights[row, j] / layer.weights[row].sum())
                size = math.hypot(*first.state.slot_out[row, j].tolist())
                raw.append(share * size * drift)
                if (row, j) == (token, slot):
                    wanted = raw[-1]
    assert float(layer.scores[token, slot]) == pytest.approx(wanted / max(raw), rel=1e-9)


def test_published_score_adds_share_weight_drift_and_norm_share() -> None:
    model = make("I1", depth=1, top_k=2)
    options = ReferenceOptions(tau=1e9, lambda_drift=1.1, lambda_share=0.6)
    ref = Reference(model, options)
    calls = trajectory(model, 2, dx=0.02)
    first = ref.step(*calls[0], refresh=True).layers[0]
    layer = ref.step(*calls[1], refresh=False).layers[0]
    raw = []
    for row in range(16):
        norms = [math.hypot(*first.state.slot_out[row, j].tolist()) for j in range(2)]
        old = first.weights[row] / first.weights[row].sum()
        now = layer.weights[row] / layer.weights[row].sum()
        for j in range(2):
            if layer.matched[row, j]:
                drift = abs(float(now[j] - old[j]))
                raw.append(float(now[j]) + 1.1 * drift + 0.6 * norms[j] / sum(norms))
    scores = layer.scores[:16][layer.matched[:16]]
    torch.testing.assert_close(
        scores, torch.tensor(raw, dtype=torch.float64) / max(raw), rtol=1e-9, atol=1e-9
    )
