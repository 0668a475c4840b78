"""Which branches count as a test for an empty selection, and when one is dropped."""

from __future__ import annotations

import ast

import pytest

from moeca_compile.capture.emptiness import find_tests


def found_in(condition: str, tail: str = "") -> list[tuple[str, bool, int]]:
    source = f"def f(self, m, i, x):\n    if {condition}:\n        x = x + 1\n{tail}    return x"
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.FunctionDef)
    return [(t.subject.id, t.is_mask, len(t.rest)) for t in find_tests(definition)]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("m.any()", ("m", True, 0)),
        ("torch.any(m)", ("m", True, 0)),
        ("m.any().item()", ("m", True, 0)),
        ("bool(m.any())", ("m", True, 0)),
        ("m.sum() > 0", ("m", True, 0)),
        ("int(m.sum()) != 0", ("m", True, 0)),
        ("m is not None and m.any()", ("m", True, 1)),
        ("len(i) > 0", ("i", False, 0)),
        ("i.numel()", ("i", False, 0)),
        ("i.shape[0] > 0", ("i", False, 0)),
        ("i.size(0) != 0", ("i", False, 0)),
    ],
)
def test_recognised(condition: str, expected: tuple[str, bool, int]) -> None:
    assert found_in(condition) == [expected]


@pytest.mark.parametrize(
    "condition",
    [
        "m.all()",
        "m.any(1)",
        "m.sum() > 2",
        "m.sum() < 1",
        "not m.any()",
        "m.any() or x is None",
        "m.float().mean() > 0.5",
        "i.shape[1] > 0",
        "i.size(1) > 0",
        "m.any() and i.numel() > 0",
        "self.m.any()",
    ],
)
def test_not_recognised(condition: str) -> None:
    assert found_in(condition) == []


def test_a_branch_with_an_alternative_is_none() -> None:
    assert found_in("m.any()", "    else:\n        x = x - 1\n") == []
