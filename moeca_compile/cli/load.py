"""The one contract of a model given on the command line: `module:factory` or `file.py:factory`.

factory() takes no argument and returns one of

    model, (x, t, y)               a module and the positional arguments of one call
    model, {"x": x, "t": t}        ... or its keyword arguments
    subject                        an object with
        .model                       the module; the command puts a compiled one in its place
        .generate()                  samples with whatever `.model` then is, returns the result
        .options                     optional: what torch.compile(options=...) gets

`report` and `debug` follow a whole generation and need the last form. The others take either; for
the last one they use the arguments of the first call that `generate()` makes.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch
from torch import nn

from ..errors import name_nearest

EXPECTED = (
    "expected (model, inputs) or an object with .model and .generate(); inputs are a tuple of "
    "positional or a dict of keyword arguments of one call"
)


@dataclass
class Subject:
    """A loaded model. args, kwargs: of one call. generator: the object with `.generate()`."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    generator: Any = None
    options: dict[str, Any] = field(default_factory=dict)

    def generate(self, model: Callable[..., Any]) -> Any:
        """Sample with `model` in the place of the subject's own. UsageError without generate()."""
        if self.generator is None:
            raise click.UsageError(
                "this command follows a whole generation: let the factory return an object with "
                ".model and .generate()"
            )
        own = self.generator.model
        self.generator.model = model
        try:
            with torch.no_grad():
                return self.generator.generate()
        finally:
            self.generator.model = own


class _FirstCall(BaseException):
    """Leaves a sampling loop at its first call; no Exception, so that no sampler swallows it."""


def load_subject(spec: str) -> Subject:
    """Import, call the factory, sort what it returned. Raises click.UsageError with the reason."""
    name, found = find_factory(spec)
    with _told_of(f"{name}()"):
        made = found()
    if isinstance(made, (tuple, list)) and len(made) == 2 and isinstance(made[0], nn.Module):
        return _with_inputs(name, *made)
    if hasattr(made, "model") and callable(getattr(made, "generate", None)):
        return _with_generate(name, made)
    if isinstance(made, nn.Module):
        raise click.UsageError(f"{name}() returned a model without inputs: {EXPECTED}")
    raise click.UsageError(f"{name}() returned {type(made).__name__}: {EXPECTED}")


def _with_inputs(name: str, model: nn.Module, inputs: Any) -> Subject:
    if isinstance(inputs, dict):
        return Subject(model, (), inputs)
    if isinstance(inputs, (tuple, list)):
        return Subject(model, tuple(inputs))
    raise click.UsageError(f"{name}() returned inputs of type {type(inputs).__name__}: {EXPECTED}")


def _with_generate(name: str, made: Any) -> Subject:
    if not isinstance(made.model, nn.Module):
        kind = type(made.model).__name__
        raise click.UsageError(f"{name}().model: expected a torch.nn.Module, got {kind}")
    subject = Subject(made.model, generator=made, options=dict(getattr(made, "options", {}) or {}))
    subject.args, subject.kwargs = _first_call(subject, name)
    return subject


def _first_call(subject: Subject, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        raise _FirstCall

    handle = subject.model.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with torch.no_grad():
            subject.generator.generate()
    except _FirstCall:
        return caught[0]
    finally:
        handle.remove()
    raise click.UsageError(f"{name}().generate() ended without calling .model")


def find_factory(spec: str) -> tuple[str, Callable[[], Any]]:
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name:
        raise click.UsageError(f"MODEL {spec!r}: expected module:factory or file.py:factory")
    module = _from_file(Path(where)) if where.endswith(".py") else _from_module(where)
    found = getattr(module, name, None)
    if not callable(found):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise click.UsageError(f"{where} has no function {name!r}{name_nearest(name, known)}")
    _refuse_arguments(name, found)
    return name, found


def _refuse_arguments(name: str, found: Callable[..., Any]) -> None:
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise click.UsageError(f"{name} is called without arguments: {error}") from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise click.UsageError(f"no file {path}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # a script finds its neighbours; so does this
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    with _told_of(str(path)):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _told_of(what: str) -> Iterator[None]:
    """An error in the user's own code as one line with its place."""
    try:
        yield
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{last.filename}:{last.lineno}"
        message = f"{what} raised {type(error).__name__}: {error} ({place})"
        raise click.UsageError(message) from error


def _from_module(name: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` has it, which the installed script has not
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise click.UsageError(f"cannot import {name}: {error}; a file ends in .py") from error
