"""Where a model loops over stacked experts: host reads in frames of a module that holds stacks.

    Experts.forward: for e in hits: .. up[e] ..     ->  Site(StackedBank(path, module, 8), callers)

Stacked weights that are gathered or multiplied in groups read nothing and are left alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from .host_reads import HostRead
from .method import Method, find_method
from .observe import MAX_CALLERS, Observation, Site, observe_arguments
from .stacked import StackedBank, stacked_parameters


def with_stacked_sites(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], observation: Observation
) -> Observation:
    """The observation with a site per module that reads the host around its stacked parameters.

    If there is one, the root runs once more for the arguments of the methods that call it.
    """
    paths = {id(module): path for path, module in root.named_modules()}
    sites: dict[int, Site] = {}
    last = observation.last_expert
    for read in observation.every_read:
        holder = _holder(read, paths)
        if holder is None:
            continue
        last = max(last, read.order + 1)
        if id(holder) not in sites and (callers := _callers(read, holder, paths)):
            size = next(iter(stacked_parameters(holder).values())).shape[0]
            bank = StackedBank(paths[id(holder)], holder, size)
            sites[id(holder)] = Site(bank, callers, location=read.place.location)
    if not sites:
        return observation
    owners = [method.module for site in sites.values() for method in site.callers]
    missing = [owner for owner in owners if id(owner) not in observation.arguments]
    arguments = observe_arguments(root, args, kwargs, missing)
    return replace(
        observation,
        sites=(*observation.sites, *sites.values()),
        arguments={**observation.arguments, **arguments},
        last_expert=last,
    )


def _holder(read: HostRead, paths: dict[int, str]) -> nn.Module | None:
    """The module of the innermost frame that holds stacks."""
    for place in read.stack:
        if place.owner is not None and id(place.owner) in paths and stacked_parameters(place.owner):
            return place.owner
    return None


def _callers(read: HostRead, holder: nn.Module, paths: dict[int, str]) -> tuple[Method, ...]:
    """Methods on the stack from the holder's own outwards."""
    start = next(i for i, place in enumerate(read.stack) if place.owner is holder)
    found = [
        find_method(place.owner, paths[id(place.owner)], place.code)
        for place in read.stack[start:]
        if place.owner is not None and id(place.owner) in paths
    ]
    return tuple(method for method in found if method is not None)[:MAX_CALLERS]
