"""Whether one part of a graph does what another one does, node by node, and which node is which.

x -> norm -> linear(w0) -> combine0        combine0 ~ combine1, linear0 ~ linear1, w0 ~ w1,
y -> norm -> linear(w1) -> combine1        x ~ y
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

NAMES = ("name", "prefix", "times")  # what a layer calls itself is no part of what it does


class Different(Exception):
    """The two parts do not do the same."""


class Counterparts:
    """Pairs nodes of a `first` part with those of a `second` one.

    given: for each part, what it only reads. There the comparison ends: such nodes may be anything
    of the same look, and are paired with each other only. of: node of the first -> of the second.
    """

    def __init__(
        self,
        gm: GraphModule,
        first_given: Callable[[Node], bool],
        second_given: Callable[[Node], bool],
    ):
        self.of: dict[Node, Node] = {}
        self._gm = gm
        self._given = first_given, second_given
        self._sets: list[tuple[frozenset[Node], frozenset[Node]]] = []

    def pair(self, first: Any, second: Any) -> None:
        """Pair all nodes in two values of one type: nodes, containers, dataclasses; raises
        Different."""
        if isinstance(first, Node):
            self._nodes(first, second)
        elif type(first) is not type(second):
            raise Different
        elif isinstance(first, frozenset):
            self._sets.append((first, second))
        elif isinstance(first, (tuple, list)):
            self._all(first, second)
        elif isinstance(first, Mapping):
            self._all(list(first), list(second))
            self._all(list(first.values()), list(second.values()))
        elif is_dataclass(first):
            for each in fields(first):
                one, other = getattr(first, each.name), getattr(second, each.name)
                if each.name not in NAMES:
                    self.pair(one, other)
                elif bool(one) is not bool(other):
                    raise Different
        elif first != second:
            raise Different

    def settle(self) -> None:
        """To be called once all is paired: compares the sets of nodes that were met."""
        for first, second in self._sets:
            if {self.of.get(node) for node in first} != second:
                raise Different

    def inside(self) -> Iterator[tuple[Node, Node]]:
        """Pairs of nodes in the bodies that the paired nodes call."""
        for one, other in self.of.items():
            if one.op == "get_attr" and one is not other:
                bodies = [getattr(self._gm, str(n.target)).graph.nodes for n in (one, other)]
                yield from zip(*bodies, strict=True)

    def _all(self, first: Any, second: Any) -> None:
        if len(first) != len(second):
            raise Different
        for one, other in zip(first, second):
            self.pair(one, other)

    def _nodes(self, first: Node, second: Any) -> None:
        waiting = [(first, second)]
        while waiting:
            one, other = waiting.pop()
            if self.of.get(one, other) is not other or not isinstance(other, Node):
                raise Different
            if one in self.of:
                continue
            given = self._given[0](one)
            if given is not self._given[1](other) or not self._look_alike(one, other, given):
                raise Different
            self.of[one] = other
            if not given:
                waiting += self._inputs(one, other)

    def _look_alike(self, one: Node, other: Node, given: bool) -> bool:
        if one is other:
            return True  # given, or what both parts make for themselves: a table of angles
        if "get_attr" in (one.op, other.op):
            return one.op == other.op and not given and self._same_body(one, other)
        return looks(one.meta.get("val")) == looks(other.meta.get("val"))

    def _same_body(self, one: Node, other: Node) -> bool:
        bodies = [getattr(self._gm, str(n.target), None) for n in (one, other)]
        return all(isinstance(b, GraphModule) for b in bodies) and same_graph(*bodies)

    def _inputs(self, one: Node, other: Node) -> list[tuple[Node, Node]]:
        if one.op == "get_attr":
            return []
        if one.op != other.op or doing(one) != doing(other):
            raise Different
        return list(zip(inputs_of(one), inputs_of(other), strict=True))


def same_graph(first: Any, second: Any) -> bool:
    """Whether two modules of a graph each, without tensors of their own, compute the same."""
    if any(True for gm in (first, second) for _ in gm.state_dict()):
        return False
    of: dict[Node, Node] = {}
    if len(first.graph.nodes) != len(second.graph.nodes):
        return False
    for one, other in zip(first.graph.nodes, second.graph.nodes):
        if one.op != other.op or one.op == "get_attr":
            return False
        if one.op != "placeholder" and doing(one) != doing(other):
            return False
        if [of[n] for n in inputs_of(one)] != inputs_of(other):
            return False
        of[one] = other
    return True


def looks(value: Any) -> Any:
    """What two values have in common that one graph can be traced for."""
    if isinstance(value, (tuple, list)):
        return tuple(looks(each) for each in value)
    if not isinstance(value, Tensor):
        return type(value), str(value)
    return value.dtype, value.device, str(tuple(value.shape)), str(value.stride())


def doing(node: Node) -> tuple[Any, str]:
    """What the node does, whatever it does it to."""
    return node.target, repr(map_arg((node.args, node.kwargs), lambda _: _ANY))  # type: ignore[arg-type, return-value]


def inputs_of(node: Node) -> list[Node]:
    """Every node among the arguments, as often and in the order as it stands there."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)  # type: ignore[arg-type]
    return found


class _Any:
    def __repr__(self) -> str:
        return "*"


_ANY = _Any()
