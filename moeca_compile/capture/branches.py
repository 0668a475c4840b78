"""Methods that branch on whether a selection is empty, found and rewritten; see emptiness.py.

reads of the host at route.py:12 and :13 in Router.forward  =>  Router.forward without the test
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from torch import nn

from .emptiness import find_tests, without_tests
from .function_source import build, parse
from .host_reads import Place
from .method import Method, find_method
from .method_level import Found
from .observe import Observation, observe_arguments
from .statements import kept_lines
from .subject import Replay


@dataclass(frozen=True)
class Branches:
    """A method whose emptiness tests were looked at. found: None if all of them stay.

    definition: the function without those that go; reason: what was done, or why not.
    """

    method: Method
    definition: ast.FunctionDef
    found: Found | None
    reason: str


def drop_branches(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], observation: Observation
) -> tuple[Branches, ...]:
    """Methods with a host read and an emptiness test; tests dropped where that is right."""
    methods = _methods_with_tests(root, observation)
    if not methods:
        return ()
    owners = [method.module for method in methods]
    recorded = observe_arguments(root, args, kwargs, owners)
    return tuple(_drop(method, recorded.get(id(method.module))) for method in methods)


def _methods_with_tests(root: nn.Module, observation: Observation) -> list[Method]:
    paths = {id(module): path for path, module in root.named_modules()}
    places = {(id(p.owner), p.code): p for p in (read.place for read in observation.reads)}
    found = [_method(place, paths) for place in places.values()]
    return [method for method in found if method is not None and _has_tests(method)]


def _method(place: Place, paths: dict[int, str]) -> Method | None:
    if place.owner is None or id(place.owner) not in paths:
        return None
    return find_method(place.owner, paths[id(place.owner)], place.code)


def _has_tests(method: Method) -> bool:
    try:
        return bool(find_tests(parse(method.plain)))
    except ValueError:  # no source to be had
        return False


def _drop(method: Method, recorded: Any) -> Branches:
    definition = parse(method.plain)
    if recorded is None:
        return Branches(method, definition, None, "the arguments of its module were not seen")
    if method.obstacle:
        return Branches(method, definition, None, method.obstacle)
    if method.module.training:
        return Branches(method, definition, None, "the module is in training mode")
    try:
        changed, refused = without_tests(definition, method.plain, Replay(method, recorded))
    except Exception as error:  # user code runs here: any failure means "leave it as it is"
        return Branches(method, definition, None, f"{type(error).__name__}: {error}")
    if changed is definition:
        return Branches(method, definition, None, refused)
    found = Found(build(changed, method.plain, {}), None, kept_lines(changed))
    reason = "a branch taken for an empty selection too"
    return Branches(method, changed, found, f"{reason}; {refused}" if refused else reason)
