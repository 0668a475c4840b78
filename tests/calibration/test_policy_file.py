"""Policy files: written, read, refused with what is wrong, checked against the model."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import moeca_compile
from calibration.sampling import denoiser
from idioms import inputs
from moeca_compile import Options, OptionsError
from moeca_compile.calibration import check
from moeca_compile.calibration.check import check_model, versions
from moeca_compile.calibration.fingerprint import difference, fingerprint
from moeca_compile.calibration.policy_file import PolicyFile, load, save
from moeca_compile.torch_compat import without_kernels


@pytest.fixture
def file() -> PolicyFile:
    return PolicyFile(
        {"policy": "fora", "interval": 3, "warmup_steps": 2},
        fingerprint(denoiser()),
        {"speedup": 2.5},
        True,
        made_with=versions(),
        measured={"speedup": 2.6, "psnr_db": 41.0},
    )


@pytest.fixture
def path(file: PolicyFile, tmp_path: Path) -> Path:
    return save(file, tmp_path / "made" / "policy.json")


def test_round_trip(file: PolicyFile, path: Path) -> None:
    assert load(path) == file
    assert [p.name for p in path.parent.iterdir()] == ["policy.json"]


def test_no_infinity_in_json(file: PolicyFile, tmp_path: Path) -> None:
    equal = dataclasses.replace(file, held_out={"psnr_db": math.inf})
    text = save(equal, tmp_path / "policy.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["held_out"] == {"psnr_db": None}


def test_the_file_is_the_base_and_given_options_override(path: Path) -> None:
    for read in (
        Options(policy_file=str(path)),
        Options.parse({"policy_file": str(path)}),
        Options.parse({}, policy_file=path),
        Options.parse(Options(), policy_file=path),
    ):
        assert (read.policy, read.interval, read.warmup_steps) == ("fora", 3, 2)
        assert read.policy_file == str(path)
    default = Options().interval
    assert default != 3
    given = Options.parse({"policy_file": path, "interval": default, "budget": 0.2})
    assert (given.policy, given.interval, given.budget) == ("fora", default, 0.2)
    assert Options.parse(Options(interval=default), policy_file=path).interval == default


@pytest.mark.parametrize(
    ("held", "policy", "named"),
    [({"policy": "auto"}, "auto", True), ({"tolerance": 0.1}, "auto", False),
     ({"budget": 0.1}, "moeca", False)],
)  # fmt: skip
def test_a_file_names_the_policy_as_an_option_does(
    file: PolicyFile, tmp_path: Path, held: dict[str, Any], policy: str, named: bool
) -> None:
    path = save(dataclasses.replace(file, options=held), tmp_path / "policy.json")
    for read in (Options(policy_file=str(path)), Options.parse(Options(), policy_file=path)):
        assert (read.policy, read.policy_named) == (policy, named)
        assert read.given == {**held, "policy_file": str(path)}
    assert Options(policy_file=str(path), interval=4).policy == ("auto" if named else "moeca")


def test_options_from_a_file_are_plain_options(path: Path) -> None:
    read = Options(policy_file=str(path))
    assert Options.parse(read.to_dict()) == read
    same = Options(policy="fora", interval=3, warmup_steps=2)
    assert read.fingerprint() == same.fingerprint()


def changed(path: Path, **parts: Any) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))
    return path


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"format": "other"}, "expected format 'moeca-policy', found 'other'.*calibrate again"),
        ({"version": 2}, "format version 2, this package reads 1"),
        ({"options": [1]}, "no table of options"),
        ({"options": {"policy_file": "a"}}, "no table of options"),
        ({"options": {"intervall": 3}}, "unknown option 'intervall'; did you mean 'interval'"),
        ({"options": {"interval": 0}}, "interval: expected an integer >= 1"),
        ({"model": {"name": 1}}, "no fingerprint"),
    ],
)
def test_a_foreign_file_is_refused(path: Path, parts: dict[str, Any], message: str) -> None:
    changed(path, **parts)
    with pytest.raises(OptionsError, match=message):
        Options(policy_file=str(path))


def test_missing_broken_and_incomplete_files_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match=r"nowhere.json: No such file.*calibrate\(save="):
        Options(policy_file=str(tmp_path / "nowhere.json"))
    data = json.loads(path.read_text())
    path.write_text(path.read_text()[:-20])
    with pytest.raises(OptionsError, match="no JSON: .*copy it again"):
        Options(policy_file=str(path))
    path.write_text(json.dumps({k: v for k, v in data.items() if k not in ("model", "target")}))
    with pytest.raises(OptionsError, match="without model, target"):
        Options(policy_file=str(path))
    path.write_text("[]")
    with pytest.raises(OptionsError, match="found 'list'"):
        Options(policy_file=str(path))
    with pytest.raises(OptionsError, match="expected None or a path"):
        Options(policy_file=3)  # pyright: ignore[reportArgumentType]


def test_fingerprint_tells_models_apart() -> None:
    own = fingerprint(denoiser())
    assert difference(own, fingerprint(denoiser())) is None
    assert "other values" in str(difference(own, fingerprint(denoiser(seed=1))))
    wide = str(difference(own, fingerprint(denoiser(dim=64))))
    assert "in the file" in wide and "more" in wide
    assert "bfloat16" in str(difference(own, fingerprint(denoiser().bfloat16())))
    bare = denoiser()
    bare.extra = torch.nn.Parameter(torch.ones(2))
    assert "extra is new" in str(difference(own, fingerprint(bare)))
    assert "extra is missing" in str(difference(fingerprint(bare), own))


def test_capture_leaves_the_fingerprint() -> None:
    model = denoiser()
    before = fingerprint(model)
    moeca_compile.prepare(model, *inputs(model))
    assert difference(before, fingerprint(model)) is None


def compiled_call(model: Any, path: Path, **options: Any) -> Any:
    x, t, y = inputs(model)
    with torch.no_grad(), without_kernels():
        moeca_compile.prepare(model, x, t, y)
        given = {"policy_file": str(path), **options}
        compiled = torch.compile(model, backend="moeca", options=given)
        for index in range(6):
            compiled(x, t - 0.1 * index, y)
    return moeca_compile.stats(compiled)


def test_compiling_with_the_file(path: Path) -> None:
    stats = compiled_call(denoiser(), path)
    assert (stats.steps, stats.refresh_steps) == (6, 3)  # two to warm up, then every third


def test_compiling_another_model_is_refused(path: Path) -> None:
    with pytest.raises(BackendCompilerFailed, match="made for another model.*other values") as e:
        compiled_call(denoiser(seed=1), path)
    assert isinstance(e.value.inner_exception, OptionsError)


def test_what_cannot_be_checked_is_said_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(check, "_TOLD", set())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            check_model(str(path), None)
        assert [r.message.count("not checked") for r in caplog.records] == [1]
        changed(path, made_with={**versions(), "torch": "2.0"})
        check_model(str(path), denoiser())
    assert "measured with torch 2.0" in caplog.text
