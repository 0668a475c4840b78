"""Attention in all spellings: query rows are computed alone, keys and values stay whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graph.attention_functions import (
    ATTENTIONS,
    SDPA,
    along_frames,
    manual,
    pushed_attention,
)
from graph.pushing import EACH, MADE, SELECTIONS, TOKENS, push, push_any_number, tokens
from moeca_compile.graph.layout import RowSpace, Selection

aten = torch.ops.aten


@pytest.mark.parametrize("name", ATTENTIONS)
def test_queries_of_the_selected_rows_meet_all_keys(name: str) -> None:
    pushed = pushed_attention(name)
    assert ATTENTIONS[name][1] in pushed.targets
    assert aten.linear.default in pushed.targets
    assert not {t for t in pushed.stops if t not in MADE | {aten.expand.default}}


def test_the_scores_of_selected_rows_are_computed_alone() -> None:
    pushed = push(manual, tokens(), selection=EACH, tolerance=1e-6)
    assert {aten.matmul.default, aten.softmax.int, aten.linear.default} <= pushed.targets


@pytest.mark.parametrize("name", ["sdpa", "manual", "einsum", "merged heads"])
def test_batched_attention_refuses_rows_of_any_sample(name: str) -> None:
    pushed = push(ATTENTIONS[name][0], tokens(), selection=SELECTIONS["flat"], tolerance=1e-6)
    assert set(pushed.stops) & {SDPA, aten.matmul.default, aten.bmm.default, aten.einsum.default}


@pytest.mark.parametrize("form", SELECTIONS)
def test_attention_within_a_token_takes_rows_of_keys_too(form: str) -> None:
    pushed = push(along_frames, tokens(), selection=SELECTIONS[form])
    assert SDPA in pushed.targets
    assert not pushed.stops or set(pushed.stops) <= MADE


ONE = RowSpace(1, TOKENS)
SINGLE = {
    "per sample": Selection(ONE, torch.tensor([4, 1, 3]), 3, per_sample=True),
    "flat": Selection(ONE, torch.tensor([4, 1, 3]), 3, per_sample=False),
    "one row": Selection(ONE, torch.tensor([4]), 1, per_sample=True),
}


# Made for two samples: masks, positions or operands that have one entry per sample.
OF_TWO = {
    "mask [B, 1, N, N]",
    "mask [B, 1, 1, N]",
    "rope by ids",
    "modulated block",
    "manual, masked",
    "cross",
    "learned queries",
}


@pytest.mark.parametrize("form", SINGLE)
@pytest.mark.parametrize("name", sorted({*ATTENTIONS, "plain rows"} - OF_TWO))
def test_a_single_sample(name: str, form: str) -> None:
    """One sample: its dim may come and go, flat rows are rows of the sample, one row is a row."""
    function = ATTENTIONS[name][0] if name in ATTENTIONS else lambda x: F.silu(x[0]).unsqueeze(0)
    pushed = push(function, tokens()[:1], selection=SINGLE[form], tolerance=1e-6)
    assert not {t for t in pushed.stops if t not in MADE}


@pytest.mark.parametrize("name", ["modulated block", "merged heads with bias", "manual, masked"])
def test_one_graph_serves_any_number_of_query_rows(name: str) -> None:
    push_any_number(ATTENTIONS[name][0], tokens(), per_sample=True)
