"""What every push-down rule is made of: its type, how it refuses, how it reads a node's arguments.

Rule = function(puller, node, layout of the node's rows) -> the node's value on selected rows
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch.fx import Node, map_arg

from .layout import Layout, tags

if TYPE_CHECKING:
    from .pull import RowPuller

Rule = Callable[["RowPuller", Node, Layout], Any]


class Stop(Exception):
    """The push-down cannot pass this node; `reason` says why."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def shape_of(node: Any) -> list[int]:
    """The static shape of a node's value with all its rows."""
    return [int(s) for s in node.meta["val"].shape]


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of an op, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def dims_argument(position: int, default: Any = None) -> Callable[[Node], list[int]]:
    """Reads an op's `dim` argument as a list; empty for "all dims"."""

    def dims(node: Node) -> list[int]:
        value = argument(node, position, "dim", default)
        if value is None:
            return []
        return [value] if isinstance(value, int) else list(value)

    return dims


def require_free(layout: Layout, dims: Sequence[int], what: str) -> None:
    """Raises Stop if token rows live in one of `dims`."""
    if any(tags(layout[d]) for d in dims):
        raise Stop(f"{what} mixes token rows")


def rest_in_full(puller: RowPuller, node: Node, own: Layout) -> Any:
    """The op on rows of its first argument, all other arguments as they are."""
    rows = puller.pull(node.args[0], own)
    rest: Any = map_arg(node.args[1:], puller.full)
    kwargs: Any = map_arg(node.kwargs, puller.full)
    return puller.call(node, (rows, *rest), kwargs)
