"""Options: every refusal names the field, what it got and what was expected."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moeca_compile import options as options_module
from moeca_compile.errors import OptionsError, OptionsTypeError, PassError
from moeca_compile.options import Options


def test_defaults_are_the_published_ones() -> None:
    o = Options()
    assert (o.policy, o.interval, o.tau, o.alpha, o.beta) == ("auto", 4, 0.8, 0.6, 0.65)
    assert (o.budget, o.order, o.warmup_steps, o.timestep) == (None, "router_first", 0, None)
    assert (o.strict, o.dump_dir) == (False, None)


ROWS: dict[str, Any] = {
    "tau": 0.8, "alpha": 0.6, "beta": 0.65, "lambda_drift": 1.0, "lambda_share": 0.6,
    "score": "input_drift", "budget": 0.1, "order": "router_first", "cache_dtype": "bfloat16",
    "interval": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "policy"),
    [
        ({}, "auto"),
        *(({name: value}, "moeca") for name, value in ROWS.items()),
        ({"interval": 1}, "auto"),
        ({"interval": 1, "budget": 0.1}, "moeca"),
        ({"tolerance": 0.1, "max_interval": 6}, "auto"),
        ({"tolerance": 0.1, "budget": 0.1}, "moeca"),
        ({"forecast_order": 2, "prediction": "clean", "corrector": False}, "auto"),
        ({"warmup_steps": 2, "timestep": "t", "strict": True, "max_cache_bytes": 9}, "auto"),
        ({"policy": "auto", "interval": 6, "budget": 0.1}, "auto"),
        ({"policy": "fora", "interval": 6}, "fora"),
        ({"policy": "moeca"}, "moeca"),
    ],
    ids=str,
)
def test_the_policy_where_none_is_named(given: dict[str, Any], policy: str) -> None:
    """Whoever gives what only row reuse reads means row reuse: no option is silently ignored."""
    for made in (Options(**given), Options.parse(given), Options.parse(Options(**given))):
        assert made.policy == policy == made.to_dict()["policy"]
        assert made.policy_named == ("policy" in given)
        assert made.given == given
    assert Options.parse(Options(), **given).policy == policy
    assert Options.parse(made.to_dict()) == made
    assert made.fingerprint() == Options.parse({**given, "policy": policy}).fingerprint()


def test_every_option_that_means_row_reuse_is_in_the_table_above() -> None:
    assert {*options_module.ROW_OPTIONS, "interval"} == ROWS.keys()


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("intervall", "interval"),
        ("warmup", "warmup_steps"),
        ("Tau", "tau"),
        ("dumpdir", "dump_dir"),
    ],
)
@pytest.mark.parametrize("how", ["constructor", "mapping", "extra", "replace"])
def test_unknown_option_names_the_nearest_and_lists_all(wrong: str, nearest: str, how: str) -> None:
    given: dict[str, Any] = {wrong: 1}
    makers = {
        "constructor": lambda: Options(**given),
        "mapping": lambda: Options.parse(given),
        "extra": lambda: Options.parse(None, **given),
        "replace": lambda: Options.parse(Options(), **given),
    }
    with pytest.raises(OptionsError) as caught:
        makers[how]()
    text = str(caught.value)
    assert repr(wrong) in text and f"did you mean {nearest!r}?" in text
    for field in dataclasses.fields(Options):
        assert field.name in text


def test_unknown_option_without_a_near_name_makes_no_guess() -> None:
    with pytest.raises(OptionsError) as caught:
        Options.parse({"qqqqqqqq": 1})
    assert "did you mean" not in str(caught.value) and "interval" in str(caught.value)


@pytest.mark.parametrize("key", [1, None])
def test_keys_that_are_no_strings_are_refused(key: object) -> None:
    with pytest.raises(OptionsError, match="unknown option"):
        Options.parse({key: 1})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("interval", True),
        ("interval", 4.0),
        ("interval", "4"),
        ("interval", None),
        ("warmup_steps", False),
        ("warmup_steps", 1.5),
        ("tau", "0.8"),
        ("tau", True),
        ("tau", None),
        ("alpha", [0.6]),
        ("beta", 1j),
        ("lambda_drift", None),
        ("lambda_share", "x"),
        ("budget", "half"),
        ("budget", True),
        ("policy", 3),
        ("score", None),
        ("order", 1),
        ("timestep", 3),
        ("strict", 1),
        ("strict", "yes"),
        ("dump_dir", 3),
    ],
)
def test_wrong_type_is_refused(name: str, value: object) -> None:
    with pytest.raises(OptionsTypeError) as caught:
        Options.parse({name: value})
    text = str(caught.value)
    assert f"option {name}" in text and repr(value) in text and "expected" in text
    assert isinstance(caught.value, (TypeError, ValueError))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("interval", 0),
        ("interval", -1),
        ("warmup_steps", -1),
        ("tau", -0.1),
        ("tau", float("nan")),
        ("tau", float("inf")),
        ("alpha", 1.01),
        ("alpha", -0.1),
        ("beta", 1.0),
        ("beta", -0.1),
        ("lambda_drift", float("nan")),
        ("lambda_share", float("inf")),
        ("budget", 0),
        ("budget", 0.0),
        ("budget", 1.0001),
        ("budget", float("nan")),
        ("timestep", ""),
    ],
)
def test_value_out_of_range_is_refused(name: str, value: object) -> None:
    with pytest.raises(OptionsError) as caught:
        Options.parse({name: value})
    assert not isinstance(caught.value, TypeError)
    text = str(caught.value)
    assert f"option {name}" in text and repr(value) in text and "expected" in text


@pytest.mark.parametrize(
    ("name", "wrong", "nearest"),
    [
        ("policy", "moca", "moeca"),
        ("score", "input-drift", "input_drift"),
        ("order", "atention_first", "attention_first"),
    ],
)
def test_unknown_choice_names_the_nearest(name: str, wrong: str, nearest: str) -> None:
    with pytest.raises(OptionsError, match=f"option {name}.*{wrong}.*did you mean '{nearest}'"):
        Options.parse({name: wrong})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("interval", 1),
        ("warmup_steps", 0),
        ("tau", 0),
        ("alpha", 0),
        ("alpha", 1),
        ("beta", 0),
        ("budget", 1),
        ("budget", 1e-9),
        ("lambda_drift", -1),
    ],
)
def test_edges_of_the_ranges_are_legal(name: str, value: object) -> None:
    assert getattr(Options.parse({name: value}), name) == value


def test_attention_first_needs_a_budget() -> None:
    with pytest.raises(OptionsError, match="attention_first.*budget"):
        Options(order="attention_first")
    assert Options(order="attention_first", budget=0.2).budget == 0.2
    with pytest.raises(OptionsError, match="attention_first"):
        Options.parse(Options(order="attention_first", budget=0.2), budget=None)


def test_parse_takes_mapping_options_none_and_extra() -> None:
    assert Options.parse(None) == Options.parse({}) == Options()
    assert Options.parse({"interval": 6}, interval=8).interval == 8
    assert Options.parse(Options(interval=6), budget=0.5) == Options(interval=6, budget=0.5)
    with pytest.raises(OptionsTypeError, match="list"):
        Options.parse(["interval"])  # pyright: ignore[reportArgumentType]


def test_frozen_round_trips_and_pickles() -> None:
    o = Options(interval=6, budget=0.5, tau=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        o.interval = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert Options.parse(json.loads(json.dumps(o.to_dict()))) == o
    assert pickle.loads(pickle.dumps(o)) == o and hash(o) == hash(Options.parse(o))
    assert type(o.tau) is float


def test_fingerprint_sees_every_option_but_the_dump_folder() -> None:
    other: dict[str, Any] = {
        "interval": 5, "tau": 0.7, "alpha": 0.5, "beta": 0.5, "lambda_drift": 2.0,
        "lambda_share": 0.5, "score": "moeca", "budget": 0.5, "warmup_steps": 1,
        "timestep": "t", "strict": True,
    }  # fmt: skip
    prints = {Options(**{name: value}).fingerprint() for name, value in other.items()}
    prints.add(Options(order="attention_first", budget=0.5).fingerprint())
    prints.add(Options().fingerprint())
    assert len(prints) == len(other) + 2
    assert Options(dump_dir="a").fingerprint() == Options().fingerprint()
    assert Options(tau=1).fingerprint() == Options(tau=1.0).fingerprint()


def test_fingerprint_is_the_same_in_another_process() -> None:
    code = "from moeca_compile.options import Options; print(Options(tau=0.7).fingerprint())"
    root = Path(options_module.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == Options(tau=0.7).fingerprint()


def test_dump_dir_falls_back_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOECA_DUMP_DIR", raising=False)
    o = Options()
    assert o.resolved_dump_dir is None
    monkeypatch.setenv("MOECA_DUMP_DIR", "somewhere")
    assert o.resolved_dump_dir == Path("somewhere") and o.dump_dir is None
    assert Options(dump_dir=Path("mine")).resolved_dump_dir == Path("mine")  # pyright: ignore[reportArgumentType]
    monkeypatch.setenv("MOECA_DUMP_DIR", "")
    assert o.resolved_dump_dir is None


def test_every_field_documents_default_and_origin() -> None:
    tree = ast.parse(inspect.getsource(Options))
    body = tree.body[0].body  # pyright: ignore[reportAttributeAccessIssue]
    documented = {}
    for field, after in zip(body, body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
            documented[field.target.id] = ast.literal_eval(after.value)  # pyright: ignore[reportAttributeAccessIssue]
    assert set(documented) == {f.name for f in dataclasses.fields(Options)}
    for text in documented.values():
        assert "Default" in text or "turns caching off" in text
        assert "paper" in text or "ours" in text


def test_pass_error_says_pass_node_expected_found_and_what_next() -> None:
    error = PassError("insert_cache", "%topk", expected="[T, K]", found="[T]", next_step="explain")
    for part in ("insert_cache", "%topk", "expected [T, K]", "found [T]", "explain"):
        assert part in str(error)
