"""The trace of a repeated block, copied, is node by node what tracing the block gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import moeca_compile.graph.retrace as retracing
import moeca_compile.graph.retrace_repeats as repeating
import moeca_compile.pipeline as pipeline
from aten_graphs import described, traced
from graph_runs import compile_model, use_graph_level
from idioms import make, trajectory
from moeca_compile.graph.constant_reads import WithConstants
from moeca_compile.graph.repeats import MIN_RUNS
from moeca_compile.graph.retrace import AtenGraph
from moeca_compile.graph.retrace_repeats import RetraceRepeats, Untransferable

DEPTH = 4
SLOW = pytest.mark.slow
WRITES = ("I4", "I6", "I7")  # to a tensor, in each block
IDIOMS = ["I1", "I2", *(pytest.param(f"I{n}", marks=SLOW) for n in range(3, 9))]


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many runs each retrace copied."""
    found: list[int] = []

    class Watched(RetraceRepeats):
        def run(self, *args: Any) -> Any:
            result = super().run(*args)
            found.append(self.copied)
            return result

    monkeypatch.setattr(retracing, "RetraceRepeats", Watched)
    return found


def refuse(*_: Any) -> Any:
    raise Untransferable


class Block(nn.Module):
    """Twenty ops; `step` is the block's own way to end."""

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], scale: float = 0.5) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.step, self.scale = step, scale

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            shift, gain = (c.float() * self.scale).chunk(2, dim=-1)
        h = nn.functional.layer_norm(x, (8,)) * (1 + gain[:, None]) + shift[:, None]
        a, b = self.up(h).float().view(2, 4, 2, 8).transpose(1, 2).unbind(1)
        h = torch.cat([a.sigmoid() * b, a.contiguous() - b], dim=-1).type_as(x)
        return self.step(x, self.down(h) * gain.mean())


class Stack(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module], behind: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks, self.behind = nn.ModuleList(blocks), behind

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x * 2
        for block in self.blocks:
            x = block(x, c)
        return self.behind(x)


def added(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def added_in_place(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def doubled(x: Tensor) -> Tensor:
    return x * 2


def part_doubled(x: Tensor) -> Tensor:
    x[:, 0].mul_(2)
    return x + x[:, :1]


def check(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    """The graph is what tracing all of it gives, and computes what the model does."""
    x, c = torch.randn(2, 4, 8), torch.randn(2, 16)
    found = traced(model.eval(), x, c)
    with monkeypatch.context() as patch:
        patch.setattr(repeating, "_copy", refuse)
        assert described(found.gm) == described(traced(model, x, c).gm)
    with torch.no_grad():
        torch.testing.assert_close(found.run(), model(x, c))


def test_blocks_are_copied(monkeypatch: pytest.MonkeyPatch, copied: list[int]) -> None:
    check(monkeypatch, Stack([Block(added) for _ in range(DEPTH)], doubled))
    assert copied[0] == DEPTH - 1


@pytest.mark.parametrize("other", [0, 2])
def test_blocks_of_other_constants_are_traced(
    monkeypatch: pytest.MonkeyPatch, copied: list[int], other: int
) -> None:
    scales = [0.25 if i == other else 0.5 for i in range(MIN_RUNS + 1)]
    check(monkeypatch, Stack([Block(added, scale) for scale in scales], doubled))
    assert copied[0] == (MIN_RUNS - 1 if other == 0 else 0)


def test_what_is_written_in_place_is_traced(
    monkeypatch: pytest.MonkeyPatch, copied: list[int]
) -> None:
    check(monkeypatch, Stack([Block(added_in_place) for _ in range(DEPTH)], doubled))
    assert copied[0] == 0


def test_nothing_stays_copied_where_something_else_is_written(
    monkeypatch: pytest.MonkeyPatch, copied: list[int]
) -> None:
    """Copies share no memory with each other, so they cannot tell what a write changes."""
    in_full: list[WithConstants] = []

    class Watched(WithConstants):
        def run(self, *args: Any) -> Any:
            in_full.append(self)
            return super().run(*args)

    monkeypatch.setattr(retracing, "WithConstants", Watched)
    check(monkeypatch, Stack([Block(added) for _ in range(DEPTH)], part_doubled))
    assert copied == [DEPTH - 1, 0] and len(in_full) == 1  # traced again


@pytest.mark.parametrize("idiom", IDIOMS)
def test_of_whole_models(monkeypatch: pytest.MonkeyPatch, copied: list[int], idiom: str) -> None:
    use_graph_level(monkeypatch)
    model = make(idiom, num_experts=4, depth=DEPTH, shared=True)

    def both(gm: GraphModule, values: Sequence[Any]) -> AtenGraph:
        found = retracing.retrace(gm, values)
        with monkeypatch.context() as patch:
            patch.setattr(repeating, "_copy", refuse)
            assert described(found.gm) == described(retracing.retrace(gm, values).gm)
        return found

    monkeypatch.setattr(pipeline, "retrace", both)
    calls = trajectory(model, 2)  # the first one captures
    compiled = compile_model(model, calls[0], policy="moeca", budget=0.3)
    with torch.no_grad():
        for call in calls:
            compiled(*call)
    assert (max(copied) >= DEPTH - 2) is (idiom not in WRITES)
