"""The table of what is searched, against the policies and options there are."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import moeca_compile.calibration.search_space as space_module
from moeca_compile import Options, OptionsError
from moeca_compile.calibration.measure import graph_key
from moeca_compile.calibration.search_space import SPACE, Driver, Space, available
from moeca_compile.policies import POLICIES


def test_every_policy_is_searched() -> None:
    assert set(available()) == set(POLICIES) & set(SPACE) == set(POLICIES)


def test_every_value_is_accepted_together() -> None:
    for policy, space in available().items():
        for choice in space.others:
            for value in choice.values:
                Options(
                    policy=policy, **{choice.name: value, space.driver.name: space.driver.start}
                )


def test_drivers_grow_and_start_inside() -> None:
    for space in available().values():
        assert list(space.driver.values) == sorted(set(space.driver.values))
        assert space.driver.start in space.driver.values


def test_what_is_not_there_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fora = SPACE["fora"]
    odd = Space(fora.driver, (*fora.others, space_module.Choice("magic", (1, 2))))
    table: dict[str, Any] = {
        "fora": odd, "tomorrow": fora, "moeca": Space(Driver("strength", (1, 2), 1)),
    }  # fmt: skip
    monkeypatch.setattr(space_module, "SPACE", table)
    found = available()
    assert list(found) == ["fora"]
    assert "magic" not in [choice.name for choice in found["fora"].others]
    with pytest.raises(OptionsError, match="cannot search 'tomorrow'"):
        available(["tomorrow"])


def test_steering_options_share_graphs_and_others_do_not() -> None:
    one = Options(policy="auto", tolerance=0.1)
    for other in ({"tolerance": 0.2}, {"max_interval": 9}, {"warmup_steps": 3}, {"interval": 7}):
        assert graph_key(dataclasses.replace(one, **other)) == graph_key(one)
    assert graph_key(dataclasses.replace(one, forecast_order=2)) != graph_key(one)
    rows = Options(policy="moeca", budget=0.1)
    assert graph_key(dataclasses.replace(rows, budget=0.3)) == graph_key(rows)
    for other in ({"budget": None}, {"score": "moeca"}, {"tau": 0.1}):
        assert graph_key(dataclasses.replace(rows, **other)) != graph_key(rows)
