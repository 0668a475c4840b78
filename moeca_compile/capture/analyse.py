"""From one eager run of a model to a decision per dispatch: replace it, or refuse with a reason.

MoE.forward -> moe_infer -> experts   =>   try moe_infer (method), moe_infer (statements),
                                           then the callers further out, nearest first
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .method_level import Found, Refused, capture_method
from .observe import Method, Observation, Site, observe
from .report import METHOD, NONE, STATEMENTS, ModuleCapture
from .statement_level import capture_statements
from .subject import Subject

_MECHANISMS = ((METHOD, capture_method), (STATEMENTS, capture_statements))
_OWNER_SIZE = 3.0  # an outer caller is copied only if it holds at most this times the bank


@dataclass(frozen=True)
class Outcome:
    """What to tell about one dispatch and, if it can be replaced, where and by what."""

    capture: ModuleCapture
    method: Method | None = None
    found: Found | None = None


def analyse(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Outcome, ...]:
    """Run `root` once and decide on every bank that looks routed; nothing is changed."""
    observation = observe(root, args, kwargs)
    return tuple(
        _analyse_site(site, observation) for site in observation.sites if site.routed or site.uneven
    )


def _analyse_site(site: Site, observation: Observation) -> Outcome:
    obstacle = _obstacle(site)
    if obstacle:
        return _refused(site, obstacle)
    refusals: list[Refused] = []
    for method in site.callers:
        if method is not site.callers[0] and _size(method.module) > _OWNER_SIZE * _size(
            site.bank.container
        ):
            break
        outcome = _try_mechanisms(site, method, observation)
        if isinstance(outcome, Outcome):
            return outcome
        refusals.append(outcome)
    furthest = max(refusals, key=lambda refusal: refusal.progress)
    return _refused(site, furthest.reason)


def _try_mechanisms(site: Site, method: Method, observation: Observation) -> Outcome | Refused:
    recorded = observation.arguments.get(id(method.module))
    name = method.attribute
    if recorded is None:
        return Refused(f"{name}: the arguments of its module were not seen")
    if not _only_turns_gradients_off(method):
        return Refused(f"{name} is decorated and the decorator may matter", 1)
    best = Refused("")
    try:
        subject = Subject(site, method, _relative(site.bank.path, method.path), recorded)
        for mechanism, capture in _MECHANISMS:
            outcome = capture(subject)
            if isinstance(outcome, Found):
                return _accepted(site, method, mechanism, outcome)
            if not best.reason or outcome.progress > best.progress:
                best = Refused(f"{name} ({mechanism}): {outcome.reason}", outcome.progress)
    except Exception as error:  # user code runs here: any failure means "leave it as it is"
        return Refused(f"{name}: {type(error).__name__}: {error}", 1)
    return best


def _obstacle(site: Site) -> str:
    if site.bank.difference:
        return site.bank.difference
    watched = [method.module for method in site.callers]
    watched.extend(site.bank.container.modules())
    if any(module.training for module in watched):
        return "the module is in training mode"
    if not site.routed:
        return "no integer tensor in sight says which rows each expert received"
    return ""


def _accepted(site: Site, method: Method, mechanism: str, found: Found) -> Outcome:
    reason = f"reproduced with {found.plan.slots} slots per token"
    experts = len(site.bank.experts)
    capture = ModuleCapture(method.path, experts, mechanism, True, reason, site.location)
    return Outcome(capture, method, found)


def _refused(site: Site, reason: str) -> Outcome:
    path, experts = site.callers[0].path, len(site.bank.experts)
    return Outcome(ModuleCapture(path, experts, NONE, False, reason, site.location))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _relative(path: str, owner: str) -> tuple[str, ...]:
    below = path[len(owner) :].strip(".")
    return tuple(below.split(".")) if below else ()


def _only_turns_gradients_off(method: Method) -> bool:
    """Whether the wrappers around the function, if any, only switch gradient recording."""
    current: Any = method.declared
    while current is not method.function:
        cells = getattr(current, "__closure__", None) or ()
        factories = [getattr(cell.cell_contents, "__self__", None) for cell in cells]
        grad_modes = (torch.no_grad, torch.inference_mode, torch.set_grad_enabled)
        if not any(isinstance(factory, grad_modes) for factory in factories):
            return False
        current = current.__wrapped__
    return True
