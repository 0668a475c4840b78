"""Parameters of which some run every time and the others with the slow tests."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def mostly_slow(names: Sequence[Any], quick: int) -> list[Any]:
    """The first `quick` run every time."""
    return [*names[:quick], *(pytest.param(name, marks=pytest.mark.slow) for name in names[quick:])]


def in_pairs(first: Sequence[Any], second: Sequence[Any], third: Sequence[Any]) -> list[Any]:
    """All combinations of three; as many run every time as pair each `first` with each `second`,
    the `third` going round (a Latin square)."""
    params = []
    for (i, a), (j, b), (k, c) in itertools.product(*map(enumerate, (first, second, third))):
        marks = () if (i + j) % len(third) == k else pytest.mark.slow
        params.append(pytest.param(a, b, c, marks=marks))
    return params
