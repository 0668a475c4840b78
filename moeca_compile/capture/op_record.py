"""What Python code asked torch for, call by call, with copies of the results.
F.linear(rows, w[e]).sigmoid()   ->   Op(getitem, (w, e)), Op(linear, ..), Op(sigmoid, ..)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..torch_compat import leaves, map_leaves


@dataclass(frozen=True)
class Op:
    """One call. result: what it returned; values: copies of that, taken at once."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    values: Any

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors among the arguments, in order."""
        return [v for v in leaves((self.args, self.kwargs))[0] if isinstance(v, Tensor)]

    @property
    def outputs(self) -> list[Tensor]:
        """Tensors among the results, in order."""
        return [v for v in leaves(self.result)[0] if isinstance(v, Tensor)]


class OpRecord(TorchFunctionMode):
    """Calls that returned tensors while the block ran and `on` was set.

    The tensors are kept, so their ids stay taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.on = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.on and any(isinstance(leaf, Tensor) for leaf in leaves(result)[0]):
            self.ops.append(Op(func, args, kwargs, result, map_leaves(_copied, result)))
        return result


def _copied(leaf: Any) -> Any:
    """A copy that later changes in place do not reach; views of parameters are left alone."""
    if not isinstance(leaf, Tensor) or isinstance(leaf, nn.Parameter):
        return leaf
    return leaf if isinstance(leaf._base, nn.Parameter) else leaf.clone()
