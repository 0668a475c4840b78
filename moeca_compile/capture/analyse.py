"""From one eager run of a model to a decision per dispatch: replace it, or refuse with a reason.

MoE.forward -> moe_infer -> experts   =>   try moe_infer (method), moe_infer (statements),
                                           then the callers further out, nearest first
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from torch import nn

from .alike import same_kinds, same_method
from .branches import Branches, drop_branches
from .fewer_rows import fewer_rows
from .host_reads import HostRead, Place
from .kernel_contexts import old_contexts
from .method import Method
from .method_level import Found, Refused, capture_method
from .observe import Observation, Site, observe
from .report import BRANCHES, CONTEXTS, METHOD, NONE, STATEMENTS, ModuleCapture
from .stacked_sites import with_stacked_sites
from .statement_level import capture_statements
from .subject import Recorded, Subject

_MECHANISMS = ((METHOD, capture_method), (STATEMENTS, capture_statements))
_OWNER_SIZE = 3.0  # an outer caller is copied only if it holds at most this times the bank


@dataclass(frozen=True)
class Outcome:
    """What to tell about one dispatch and, if it can be replaced, where and by what."""

    capture: ModuleCapture
    method: Method | None = None
    found: Found | None = None


@dataclass(frozen=True)
class _Case:
    """A method that may hold the dispatch to the bank of `site`, and what it was seen to take.

    definition: its code without branches on empty selections, if it has any. result: what its
    module was seen to return.
    """

    site: Site
    method: Method
    recorded: Recorded
    definition: ast.FunctionDef | None
    result: Any

    @property
    def bank_path(self) -> tuple[str, ...]:
        below = self.site.bank.path[len(self.method.path) :].strip(".")
        return tuple(below.split(".")) if below else ()

    def subject(self, recorded: Recorded) -> Subject:
        """To be experimented on with arguments `recorded`, a part of the case's or all of them."""
        whole = None if recorded is self.recorded else (self.recorded, self.result)
        return Subject(self.site, self.method, self.bank_path, recorded, self.definition, whole)

    def repeats(self, other: _Case) -> bool:
        """Whether this is the same code as `other`, called alike; only values differ."""
        banks = self.site.bank.size == other.site.bank.size and self.bank_path == other.bank_path
        one, two = (c.definition and ast.dump(c.definition) for c in (self, other))
        same = banks and one == two and same_kinds(self.recorded, other.recorded)
        return same and same_method(self.method, other.method)


@dataclass(frozen=True)
class Findings:
    """What is to be done to a root. dispatches: per bank; others: per method in the way.

    remaining: host reads among or before the experts that nothing above removes; behind: those
    after the last expert, which cut off the end of the graph only.
    result: what the root returned eagerly.
    """

    dispatches: tuple[Outcome, ...]
    others: tuple[Outcome, ...]
    remaining: tuple[HostRead, ...]
    behind: tuple[HostRead, ...]
    result: Any


def analyse(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Findings:
    """Run `root` and decide on every bank that looks routed, and on what breaks a trace before it.

    Nothing is changed. The root runs once, once more if it branches on empty selections, and once
    more if it loops over stacked parameters.
    """
    observation = with_stacked_sites(root, args, kwargs, observe(root, args, kwargs))
    branches = drop_branches(root, args, kwargs, observation)
    sites = [site for site in observation.sites if site.routed or site.uneven]
    proven: list[tuple[_Case, Outcome]] = []
    dispatches = tuple(_analyse_site(site, observation, branches, proven) for site in sites)
    done = {_key(o.method) for o in dispatches if o.method is not None}
    others = [_branch_outcome(b) for b in branches if _key(b.method) not in done]
    done |= {_key(o.method) for o in others if o.method is not None}
    others += _context_outcomes(root, done)
    found = [o for o in (*dispatches, *others) if o.found is not None]
    left = [r for r in observation.every_read if not _removed(r, found)]
    remaining = tuple(r for r in left if r.order < observation.last_expert)
    behind = tuple(r for r in left if r.order >= observation.last_expert)
    return Findings(dispatches, tuple(others), remaining, behind, observation.result)


def _key(method: Method) -> tuple[int, str]:
    return id(method.module), method.attribute


def _branch_outcome(branches: Branches) -> Outcome:
    method = branches.method
    accepted, reason = branches.found is not None, branches.reason
    mechanism = BRANCHES if accepted else NONE
    capture = ModuleCapture(method.path, 0, mechanism, accepted, reason, method.location)
    return Outcome(capture, method if accepted else None, branches.found)


def _context_outcomes(root: nn.Module, done: set[tuple[int, str]]) -> list[Outcome]:
    """Attention kernels chosen in the old way, in methods that are not replaced otherwise."""
    outcomes = []
    for method, found, reason in old_contexts(root):
        taken = _key(method) in done
        reason = "the method is replaced for another reason" if taken else reason
        accepted = found is not None and not taken
        mechanism = CONTEXTS if accepted else NONE
        capture = ModuleCapture(method.path, 0, mechanism, accepted, reason, method.location)
        outcomes.append(Outcome(capture, method, found) if accepted else Outcome(capture))
    return outcomes


def _removed(read: HostRead, outcomes: list[Outcome]) -> bool:
    """Whether some frame of the read stands in a line that runs no more."""
    return any(_gone(place, outcome) for place in read.stack for outcome in outcomes)


def _gone(place: Place, outcome: Outcome) -> bool:
    method, found = outcome.method, outcome.found
    if method is None or found is None or place.owner is not method.module:
        return False
    return place.code is method.function.__code__ and place.line not in found.kept_lines


def _analyse_site(
    site: Site,
    observation: Observation,
    branches: tuple[Branches, ...],
    proven: list[tuple[_Case, Outcome]],
) -> Outcome:
    """Decide on one bank. proven: dispatches that met every probe; this one is added if it does."""
    obstacle = _obstacle(site)
    if obstacle:
        return _refused(site, obstacle)
    refusals: list[Refused] = []
    for method in site.callers:
        if method is not site.callers[0] and _size(method.module) > _OWNER_SIZE * _size(
            site.bank.container
        ):
            break
        recorded = observation.arguments.get(id(method.module))
        if recorded is None:
            refusals.append(
                Refused(f"{method.attribute}: the arguments of its module were not seen")
            )
            continue
        if method.obstacle:
            refusals.append(Refused(method.obstacle, 1))
            continue
        definition = next((b.definition for b in branches if b.method == method), None)
        result = observation.results.get(id(method.module))
        case = _Case(site, method, recorded, definition, result)
        if (repeated := _as_before(case, proven)) is not None:
            return repeated
        outcome = _try_mechanisms(case)
        if isinstance(outcome, Outcome):
            proven.append((case, outcome))
            return outcome
        refusals.append(outcome)
    furthest = max(refusals, key=lambda refusal: refusal.progress)
    return _refused(site, furthest.reason)


def _as_before(case: _Case, proven: list[tuple[_Case, Outcome]]) -> Outcome | None:
    """The replacement of a dispatch that `case` repeats, if it holds on the recorded input too."""
    for before, outcome in proven:
        found = outcome.found
        try:
            if found is not None and case.repeats(before) and _holds(case, found):
                return _accepted(case, outcome.capture.mechanism, found, like=before.method.path)
        except Exception:  # user code runs here; the full analysis will say what is wrong
            return None
    return None


def _holds(case: _Case, found: Found) -> bool:
    seen = (case.recorded, case.result)
    # one sample: shapes are understood
    recorded, result = fewer_rows(seen, case.site.bank.size, samples=1) or seen
    subject = case.subject(recorded)
    # a result need not have a row a sample
    gives = subject.gives(found.replacement, result)
    return gives or not subject.differs_as_recorded(found.replacement)


def _try_mechanisms(case: _Case) -> Outcome | Refused:
    few = fewer_rows(case.recorded, case.site.bank.size)
    if few is not None:
        outcome = _try_on(case, few)
        if isinstance(outcome, Outcome):
            return outcome
    return _try_on(case, case.recorded)


def _try_on(case: _Case, recorded: Recorded) -> Outcome | Refused:
    name, best = case.method.attribute, Refused("")
    try:
        subject = case.subject(recorded)
        for mechanism, capture in _MECHANISMS:
            outcome = capture(subject)
            if isinstance(outcome, Found):
                return _accepted(case, mechanism, outcome)
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


def _accepted(case: _Case, mechanism: str, found: Found, like: str = "") -> Outcome:
    slots = found.plan.slots if found.plan is not None else 0
    reason = f"reproduced with {slots} slots per token" + (f", as {like}" if like else "")
    site, method = case.site, case.method
    capture = ModuleCapture(method.path, site.bank.size, mechanism, True, reason, site.location)
    return Outcome(capture, method, found)


def _refused(site: Site, reason: str) -> Outcome:
    path, experts = site.callers[0].path, site.bank.size
    return Outcome(ModuleCapture(path, experts, NONE, False, reason, site.location))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
