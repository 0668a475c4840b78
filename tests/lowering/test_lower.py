"""Lowering leaves out what changes nothing, and only that; counts of layers of equal sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graph_runs import only_entry, use_graph_level
from lowered import small_run
from moeca_compile.lowering.lower import lower, share_counts, trace
from moeca_compile.torch_compat import known_options, new_fake_mode

NOTHING: dict[str, Callable[[Tensor], Tensor]] = {
    "dtype": lambda x: x.to(torch.float32),
    "order": lambda x: x.permute(0, 1),
    "reshape": lambda x: x.reshape(4, 4),
    "view": lambda x: x.view(4, 4),
    "narrow": lambda x: x.narrow(0, 0, 4),
}
SOMETHING: dict[str, Callable[[Tensor], Tensor]] = {
    "dtype": lambda x: x.to(torch.float64),
    "copy": lambda x: x.to(torch.float32, copy=True),
    "turned": lambda x: x.permute(1, 0),  # of the same shape
    "turned back": lambda x: x.t().reshape(4, 4),  # a copy in other memory order
    "flat": lambda x: x.reshape(16),
    "part": lambda x: x.narrow(0, 1, 3),
}


CONSTANT = torch.arange(16.0).reshape(4, 4)
SOMETHING["constant"] = lambda x: x + CONSTANT.to(torch.float32)


def lowered(function: Callable[[Tensor], Tensor]) -> tuple[list[str], Tensor, Tensor]:
    """Ops of `function` with arithmetic around it, what that gives, and what it is to give."""

    def whole(x: Tensor) -> Tensor:
        return function(x + 1) * 2

    mode = new_fake_mode()
    with mode:
        given = torch.empty(4, 4)
    gm = lower(trace(whole, [given], mode), mode)
    ops = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]
    x = torch.arange(16.0).reshape(4, 4)
    return ops, gm(x), whole(x)


@pytest.mark.parametrize("name", NOTHING)
def test_what_changes_nothing_goes(name: str) -> None:
    ops, found, expected = lowered(NOTHING[name])
    assert ops == ["aten.add.Tensor", "aten.mul.Tensor"]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", SOMETHING)
def test_what_changes_something_stays(name: str) -> None:
    ops, found, expected = lowered(SOMETHING[name])
    assert len(ops) > 2
    assert torch.equal(found, expected)


def test_layers_of_equal_sizes_read_one_count() -> None:
    def layers(counts: Tensor, x: Tensor) -> Tensor:
        found = []
        for number in range(3):
            branches, tokens = (count.item() for count in counts[number])
            for size in (branches, tokens):
                torch._check(size >= 2)
                torch._check(size <= 8)
            found.append(x.narrow(0, 0, branches).sum() * 2 + x.narrow(0, 0, tokens).sum())
        return torch.stack(found)

    mode = new_fake_mode()
    with mode:
        given = [torch.empty(3, 2, dtype=torch.int64), torch.empty(8)]
    gm = lower(trace(layers, given, mode), mode)
    counts = gm.graph.find_nodes(op="placeholder")[0]
    item = torch.ops.aten.item.default
    assert len(gm.graph.find_nodes(op="call_function", target=item)) == 6
    share_counts(gm, counts, [0, 1, 0])
    gm.graph.lint()
    gm.recompile()
    assert len(gm.graph.find_nodes(op="call_function", target=item)) == 4
    x, allowed = torch.arange(8.0), torch.tensor([[3, 2], [5, 4], [3, 2]])
    assert torch.equal(gm(allowed, x), layers(allowed, x))


def test_loops_over_slots_are_scalar_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "cpp.enable_loop_tail_vec"
    use_graph_level(monkeypatch)
    run, _ = small_run()
    variants = only_entry(run).variants
    graph, _ = variants.dialect("reuse")
    assert variants._inductor_config("reuse", graph)[name] is False
    assert name not in variants._inductor_config("plain", graph)
    monkeypatch.setattr(variants, "_config", {name: True})
    assert variants._inductor_config("reuse", graph)[name] is True


def test_options_that_this_torch_does_not_have_are_left_out() -> None:
    given = {"cpp.threads": 3, "cpp.of_another_torch": 1}
    assert known_options(given) == {"cpp.threads": 3}
