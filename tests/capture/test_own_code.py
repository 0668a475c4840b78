"""The captured model's forward shares no code object with its class."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_compile
from idioms import inputs, make
from moeca_compile.backend import moeca
from moeca_compile.capture import uninstall
from moeca_compile.capture.own_code import copy_function, own_forward


class Decorated(nn.Module):
    scale = 3.0

    @torch.no_grad()
    def forward(self, x: Tensor, *, bias: float = 1.0) -> Tensor:
        assert super().state_dict() == {}
        return x * self.scale + bias


def test_copies_behave_alike_and_share_no_code() -> None:
    own = copy_function(Decorated.forward)
    x = torch.randn(3)
    torch.testing.assert_close(own(Decorated(), x, bias=2.0), x * 3 + 2)
    assert own.__code__ is not Decorated.forward.__code__
    assert own.__wrapped__.__code__ is not Decorated.forward.__wrapped__.__code__
    inner = [c.cell_contents for c in own.__closure__]
    assert own.__wrapped__ in inner and Decorated.forward.__wrapped__ not in inner


class Unusual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = 1.0

    def positional(self, x: Any, /, y: Any, *rest: Any, z: float = 2.0, **more: Any) -> Any:
        return x * y + sum(rest) + z + self.shift + sum(more.values())

    unnamed = lambda self, x, y=3: x * y + self.shift  # noqa: E731


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("ours", [False, True])
def test_every_signature_reaches_the_right_function(ours: bool, reads: bool) -> None:
    asked: list[nn.Module] = []

    def keeps(module: nn.Module) -> bool:
        asked.append(module)
        return True

    def made(declared: Any) -> Any:
        own = own_forward(declared, lambda: ours, keeps if reads else None)
        inside = own.__wrapped__ if ours else declared
        assert inside in [cell.cell_contents for cell in own.__closure__]
        assert own.__code__.co_firstlineno == declared.__code__.co_firstlineno
        return own

    x, model = torch.randn(3), Unusual()
    calls = [
        (made(Unusual.positional)(model, x, x, x, z=1.0, w=x), x * x + x + 2 + x),
        (made(Unusual.unnamed)(model, x), x * 3 + 1),
        (made(Decorated.forward)(decorated := Decorated(), x, bias=2.0), x * 3 + 2),
    ]
    for found, expected in calls:
        torch.testing.assert_close(found, expected)
    assert asked == ([model, model, decorated] if ours and reads else [])


def test_installed_forward_is_own_and_goes_away() -> None:
    model = make("I1")
    x = inputs(model)
    before = model(*x)
    moeca_compile.prepare(model, *x)
    assert vars(model)["forward"].__func__.__code__ is not type(model).forward.__code__
    torch.testing.assert_close(model(*x), before, rtol=0, atol=0)
    twin = copy.deepcopy(model)
    assert vars(twin)["forward"].__self__ is twin
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    torch.testing.assert_close(torch.load(stream, weights_only=False)(*x), before)
    uninstall(model)
    assert "forward" not in vars(model)


@pytest.mark.compile
@pytest.mark.slow
def test_another_backend_giving_up_on_the_class_does_not_touch_this_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Alternating with a backend that breaks on the dispatch compiles nothing again."""
    import moeca_compile.lowering.variants as variants

    monkeypatch.setattr(variants, "inductor", lambda gm, inputs, mode, config: gm)
    graphs: list[Any] = []

    def counting(gm: Any, example: Any, **kwargs: Any) -> Any:
        graphs.append(gm)
        return moeca(gm, example, **kwargs)

    counting._moeca_backend = True  # type: ignore[attr-defined]
    mine, other = make("I1"), make("I1")
    compiled = torch.compile(mine, backend=counting)
    broken = torch.compile(other, backend="eager")
    x, t, y = inputs(mine)
    with torch.no_grad():
        expected = mine(x, t, y)
        for _ in range(2):
            compiled(x, t, y)
            broken(x, t, y)
        seen = len(graphs)
        for _ in range(3):
            broken(x, t, y)
            torch.testing.assert_close(compiled(x, t, y), expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == seen
    assert moeca_compile.stats(compiled).steps >= 4
