"""The policies by name. A new one is a subclass of `Policy` and a line here.

Options(policy="moeca")  ->  find_policy("moeca")  ->  MoecaPolicy
"""

from __future__ import annotations

from moeca_compile.errors import OptionsError, name_nearest
from moeca_compile.policies.auto import AutoPolicy
from moeca_compile.policies.duca import DucaPolicy
from moeca_compile.policies.moeca import MoecaPolicy
from moeca_compile.policies.output_forecast import OutputForecastPolicy
from moeca_compile.policies.protocol import Policy
from moeca_compile.policies.taylorseer import ForaPolicy, TaylorSeerPolicy
from moeca_compile.policies.teacache import TeaCachePolicy
from moeca_compile.policies.toca import TocaPolicy

POLICIES: dict[str, type[Policy]] = {
    "auto": AutoPolicy,
    "moeca": MoecaPolicy,
    "fora": ForaPolicy,
    "taylorseer": TaylorSeerPolicy,
    "output_forecast": OutputForecastPolicy,
    "teacache": TeaCachePolicy,
    "toca": TocaPolicy,
    "duca": DucaPolicy,
}


def find_policy(name: str) -> type[Policy]:
    """The class registered as `name`. Raises OptionsError naming the nearest one."""
    if name not in POLICIES:
        raise OptionsError(f"unknown policy {name!r}{name_nearest(name, POLICIES)}")
    return POLICIES[name]
