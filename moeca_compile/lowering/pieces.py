"""A graph compiled in pieces, so that what repeats in it is compiled once (regional compilation).

compile_in_pieces(graph, static, compile)(*inputs) -> outputs, or None where nothing repeats

Twelve equal blocks are one compiled block, called twelve times with other weights and caches. What
this costs: nothing is fused across a block's border, and each call of a piece has its overhead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch.fx import Graph, GraphModule, Node, map_arg
from torch.nn import Module

from ..graph.counterparts import inputs_of
from ..graph.repeats import Group, find_groups

Compile = Callable[[GraphModule, list[Any], set[int]], Callable[..., Any]]


@dataclass(frozen=True)
class Step:
    """One call of a piece: numbers of the values it takes and makes, and which are not needed
    afterwards."""

    piece: Callable[..., Any]
    takes: tuple[int, ...]
    makes: tuple[int, ...]
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Pieces:
    """Runs the steps in order. constants: values behind the inputs; results: numbers of the
    outputs, None for an output that is no value but itself, in `fixed`."""

    steps: tuple[Step, ...]
    constants: tuple[Any, ...]
    size: int
    results: tuple[int | None, ...]
    fixed: tuple[Any, ...]
    summary: str

    def __call__(self, *inputs: Any) -> list[Any]:
        values = [*inputs, *self.constants]
        values += [None] * (self.size - len(values))
        for step in self.steps:
            made = step.piece(*[values[i] for i in step.takes])
            for i, value in zip(step.makes, made, strict=True):
                values[i] = value
            del made
            for i in step.ends:
                values[i] = None
        return [f if i is None else values[i] for i, f in zip(self.results, self.fixed)]


def compile_in_pieces(gm: GraphModule, static: set[int], compile_one: Compile) -> Pieces | None:
    """None where nothing repeats. static: positions of the inputs that stay where they are.
    compile_one: of a graph, its inputs (fake ones and constants), the positions of those that stay.
    """
    groups = find_groups(gm.graph)
    if groups is None:
        return None
    holes = gm.graph.find_nodes(op="placeholder")
    attributes = gm.graph.find_nodes(op="get_attr")
    constants = [attrgetter(str(n.target))(gm) for n in attributes]
    if any(isinstance(c, Module) for c in constants):
        return None
    number = {node: i for i, node in enumerate([*holes, *attributes])}
    values = dict(zip(attributes, constants, strict=True))
    staying = {holes[i] for i in static}
    calls: list[tuple[Callable[..., Any], Sequence[Node], list[Node]]] = []
    for group in groups:
        graph = _graph_of(group)
        first = group.operands[0]
        inputs = [values[n] if n in values else n.meta["val"] for n in first]
        stay = {
            i
            for i, given in enumerate(zip(*group.operands, strict=True))
            if all(n in staying for n in given)
        }
        piece = compile_one(GraphModule(Module(), graph), inputs, stay)
        for run, given in zip(group.runs, group.operands, strict=True):
            calls.append((piece, given, [run[i] for i in group.results]))
    for _, _, made in calls:
        for node in made:
            number[node] = len(number)
    outputs = gm.graph.output_node().args[0]
    assert isinstance(outputs, (tuple, list))
    return Pieces(
        _steps(calls, number, len(holes) + len(constants), outputs),
        tuple(constants),
        len(number),
        tuple(number[o] if isinstance(o, Node) else None for o in outputs),
        tuple(None if isinstance(o, Node) else o for o in outputs),
        _summary(groups),
    )


def _graph_of(group: Group) -> Graph:
    """The first run as a graph of its own.

    Its arguments go by their place, not by their node: what is one value to the first run may be
    two to another.
    """
    graph = Graph()
    holes: dict[tuple[Node, ...], Node] = {}
    for given in zip(*group.operands, strict=True):
        holes[given] = graph.placeholder(f"operand_{len(holes)}")
        holes[given].meta.update(given[0].meta)
    made: dict[Node, Node] = {}
    for nodes in zip(*group.runs, strict=True):
        first = nodes[0]
        uses = iter(zip(*map(inputs_of, nodes), strict=True))

        def argument(node: Node, uses: Iterator[tuple[Node, ...]] = uses) -> Node:
            given = next(uses)
            return made[node] if node in made else holes[given]

        args, kwargs = map_arg((first.args, first.kwargs), argument)
        made[first] = graph.create_node(first.op, first.target, args, kwargs, first.name)
        made[first].meta.update(first.meta)
    graph.output(tuple(made[group.runs[0][i]] for i in group.results))
    return graph


def _steps(
    calls: Sequence[tuple[Callable[..., Any], Sequence[Node], list[Node]]],
    number: dict[Node, int],
    given: int,
    outputs: Sequence[Any],
) -> tuple[Step, ...]:
    """The calls by numbers; what the caller gave is the caller's to let go."""
    needed = {number[o] for o in outputs if isinstance(o, Node)}
    steps = []
    for piece, operands, made in reversed(calls):
        takes, makes = (tuple(number[n] for n in nodes) for nodes in (operands, made))
        last = dict.fromkeys(i for i in (*takes, *makes) if i >= given and i not in needed)
        needed.update(last)
        steps.append(Step(piece, takes, makes, tuple(last)))
    return tuple(reversed(steps))


def _summary(groups: Sequence[Group]) -> str:
    """For dumps: "24 + 12 x 67 + 13 nodes"."""
    sizes = [f"{len(g.runs)} x {len(g.runs[0])}" for g in groups]
    return " + ".join(s.removeprefix("1 x ") for s in sizes) + " nodes"
