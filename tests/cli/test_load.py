"""MODEL on the command line: the three forms of the contract, and errors that say what to do."""

from __future__ import annotations

import click
import pytest
import torch

from cli.commands import SUBJECTS
from moeca_compile.cli.load import load_subject


def spec(name: str) -> str:
    return f"{SUBJECTS}:{name}"


def test_positional_and_keyword_inputs() -> None:
    by_position, by_name = load_subject(spec("pair")), load_subject(spec("keywords"))
    assert len(by_position.args) == 3 and not by_position.kwargs
    assert sorted(by_name.kwargs) == ["t", "x", "y"] and not by_name.args


def test_a_sampler_shows_its_first_call_and_samples_with_another_model() -> None:
    subject = load_subject(spec("Sampler"))
    x, t, _ = subject.args
    assert torch.equal(x, subject.generator.calls[0][0]) and float(t[0]) == pytest.approx(0.9)
    assert subject.options == {"policy": "moeca", "interval": 3, "tau": 0.5}
    seen = []
    subject.generate(lambda *args: seen.append(args) or args[0])
    assert len(seen) == 6
    assert subject.generator.model is subject.model, "put back"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nofile.py:build", "no file nofile.py"),
        ("nocolon", "expected module:factory or file.py:factory"),
        ("no_such_module:build", "cannot import no_such_module"),
        (spec("pari"), "no function 'pari'; did you mean 'pair'"),
        (spec("no_inputs"), "a model without inputs: expected"),
        (spec("needs_arguments"), "is called without arguments"),
    ],
)
def test_errors_name_what_was_wrong(given: str, message: str) -> None:
    with pytest.raises(click.UsageError, match=message):
        load_subject(given)


def test_a_module_by_its_name() -> None:
    assert load_subject("cli.subjects:dense").model.in_features == 4


def test_sampling_needs_a_sampler() -> None:
    with pytest.raises(click.UsageError, match="follows a whole generation"):
        load_subject(spec("pair")).generate(lambda *_: None)
