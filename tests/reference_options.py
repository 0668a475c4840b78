"""The options the method reads, as a protocol, and a stand-alone set of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class MethodOptions(Protocol):
    """The fields of `moeca_compile.Options` that the method reads; any such object will do."""

    @property
    def tau(self) -> float: ...
    @property
    def alpha(self) -> float: ...
    @property
    def beta(self) -> float: ...
    @property
    def lambda_drift(self) -> float: ...
    @property
    def lambda_share(self) -> float: ...
    @property
    def score(self) -> str: ...
    @property
    def budget(self) -> float | None: ...
    @property
    def order(self) -> str: ...
    @property
    def forecast_order(self) -> int | None: ...
    @property
    def policy(self) -> str: ...


@dataclass(frozen=True)
class ReferenceOptions:
    """Stand-alone `MethodOptions` with the published values."""

    tau: float = 0.8
    alpha: float = 0.6
    beta: float = 0.65
    lambda_drift: float = 1.0
    lambda_share: float = 0.6
    score: str = "moeca"
    budget: float | None = None
    order: str = "router_first"
    forecast_order: int | None = None
    policy: str = "moeca"
