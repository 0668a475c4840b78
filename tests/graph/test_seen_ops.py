"""A dry run that works out each op once meets what one that works out all of them does."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import moeca_compile.graph.dry_run as dry_run
import moeca_compile.graph.streams as streams
import moeca_compile.pipeline as pipeline
from graph_runs import compile_model, use_graph_level
from idioms import make, trajectory
from moeca_compile.graph.region import Regions
from moeca_compile.graph.seen_ops import SeenOps
from moeca_compile.torch_compat import new_fake_mode

SLOW = pytest.mark.slow
IDIOMS = ["I1", "I3", *(pytest.param(f"I{n}", marks=SLOW) for n in (2, *range(4, 9)))]


def test_values_of_one_look_are_one() -> None:
    mode = new_fake_mode()
    with mode, SeenOps(mode):
        x, y = torch.empty(2, 3), torch.ones(2, 3)
        assert x + 1 is y + 1
        assert x + 1 is not x + 1.0 and x + 1 is not x + True  # other numbers, other dtypes
        assert (x.t() + 1).stride() == (1, 3) and (x + 1).stride() == (3, 1)
        assert x.sum(dim=1, keepdim=True).shape == (2, 1) and x.sum(dim=1).shape == (2,)
        assert x[:, :2].shape == (2, 2) and x[:, :1].shape == (2, 1)
        assert [part.shape for part in x.split([1, 2], dim=1)] == [(2, 1), (2, 2)]
    with mode, SeenOps(mode):
        assert torch.ones(2, 3) + 1 is y + 1  # for as long as the mode is there


def test_numbers_are_not_remembered() -> None:
    mode = new_fake_mode()
    one, two = torch.tensor([1, 2]), torch.tensor([3, 4])
    with SeenOps(mode):
        assert (one + 1).tolist() == [2, 3] and (two + 1).tolist() == [4, 5]
        assert [int(v) for v in two] == [3, 4] and one.sum().item() == 3


@pytest.mark.parametrize("idiom", IDIOMS)
def test_the_same_regions_are_found(monkeypatch: pytest.MonkeyPatch, idiom: str) -> None:
    use_graph_level(monkeypatch)
    model, match = make(idiom, num_experts=4, depth=3, shared=True), pipeline.match_regions
    compared: list[int] = []

    def both(gm: Any) -> Regions:
        found = match(gm)
        with monkeypatch.context() as patch:
            for module in (dry_run, streams):
                patch.setattr(module, "SeenOps", lambda _: nullcontext())
            assert match(gm) == found
        compared.append(len(found.moe))
        return found

    monkeypatch.setattr(pipeline, "match_regions", both)
    calls = trajectory(model, 2)
    compiled = compile_model(model, calls[0], policy="moeca", budget=0.3)
    with torch.no_grad():
        for call in calls:
            compiled(*call)
    assert max(compared) == 3
