"""One recorded call of an expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ExpertCall:
    """One recorded call: tensors are copies taken before the expert ran; output after it."""

    expert: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def rows(self) -> int:
        """Rows of the first tensor argument."""
        tensors = [a for a in (*self.args, *self.kwargs.values()) if isinstance(a, Tensor)]
        return tensors[0].shape[0] if tensors and tensors[0].dim() else -1
