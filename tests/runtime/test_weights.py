"""Every documented way to change weights is seen, once; nothing else is."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from moeca_compile.runtime.weights import WeightVersion


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def _add(model: nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters()).add_(1)


def _swap(model: nn.Module) -> None:
    parameter = next(model.parameters())
    parameter.data = parameter.data.clone()


def _step(model: nn.Module) -> None:
    model(torch.ones(1, 4)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize(
    "edit", [_add, _swap, _step, lambda m: m.load_state_dict(_model().state_dict())]
)
def test_an_edit_is_seen_once(edit: Callable[[nn.Module], object]) -> None:
    model = _model()
    version = WeightVersion(list(model.parameters()))
    model(torch.ones(1, 4))
    assert not version.changed()
    edit(model)
    assert version.changed()
    assert not version.changed()


def test_assigned_state_dict_is_seen_through_the_calls_parameters() -> None:
    model = _model()
    version = WeightVersion(list(model.parameters()))
    assert not version.changed(list(model.parameters()))
    model.load_state_dict({k: v.clone() for k, v in _model().state_dict().items()}, assign=True)
    assert version.changed(list(model.parameters()))
    assert not version.changed(list(model.parameters()))
    _add(model)
    assert version.changed(list(model.parameters()))


def test_inference_tensors_are_tolerated() -> None:
    with torch.inference_mode():
        model = _model()
    assert all(p.is_inference() for p in model.parameters())
    params = [*model.parameters(), torch.ones(2)]
    version = WeightVersion(params)
    assert not version.changed()
    assert not version.changed(params)


def test_no_parameters() -> None:
    assert not WeightVersion([]).changed()


def test_a_storage_given_back_and_taken_again_is_seen() -> None:
    model = _model()
    version = WeightVersion(list(model.parameters()))
    model.to(torch.bfloat16).to(torch.float32)  # often the same addresses, never a new version
    assert version.changed()
    assert not version.changed()


def test_deleted_parameters_are_not_kept() -> None:
    model = _model()
    version = WeightVersion(list(model.parameters()))
    alive = weakref.ref(next(model.parameters()))
    del model
    assert alive() is None
    assert version.changed()
