"""The policies by name. A new one is a class with the `Policy` protocol and a line here.

Options(policy="moeca")  ->  find_policy("moeca")  ->  MoecaPolicy
"""

from __future__ import annotations

from moeca_compile.errors import OptionsError, name_nearest
from moeca_compile.policies.moeca import MoecaPolicy
from moeca_compile.policies.protocol import Policy

POLICIES: dict[str, type[Policy]] = {"moeca": MoecaPolicy}


def find_policy(name: str) -> type[Policy]:
    """The class registered as `name`. Raises OptionsError naming the nearest one."""
    if name not in POLICIES:
        raise OptionsError(f"unknown policy {name!r}{name_nearest(name, POLICIES)}")
    return POLICIES[name]
