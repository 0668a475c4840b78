"""What a graph does again and again: the blocks of a denoiser, to be traced and compiled once.

    p q | a b c | a b c | a b c | y z      nodes in order; equal letters do the same to other values
    ->  Group([p q]), Group([a b c] three times), Group([y z])

Two runs do the same if node by node op and constants are equal, and every argument either is the
same node of its own run, or comes from outside in both. Nothing is asked about names or modules.

A block that picks its own part of an input, `states[3]`, does so by another constant than the next
one. Where that is what keeps blocks apart, such picks are taken to the front:

    p | s0 a b c | s1 a b c | s2 a b c | y      ->  s0 s1 s2 p | a b c | a b c | a b c | y
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .counterparts import doing, inputs_of
from .functional import storage_of

aten = torch.ops.aten
PICKS = {aten.select.int, aten.slice.Tensor, aten.narrow.default, operator.getitem}  # views
ASSIGNED = "add and concat floordiv lshift matmul mod mul or pow rshift sub truediv xor"
IN_PLACE = {operator.setitem, *(getattr(operator, f"i{name}") for name in ASSIGNED.split())}
MIN_RUNS = 3  # two are compiled faster in one graph with what is around them
MIN_LENGTH = 16  # nodes
PERIODS = 16  # distances between equal nodes that are tried, the commonest first

Alike = Callable[[Sequence[Node]], bool]  # whether runs may take all of these in one place


@dataclass(frozen=True)
class Group:
    """Runs of nodes that do the same. operands: what each run takes from outside of it, slot by
    slot; results: positions in a run whose values are used outside of it, in any of the runs."""

    runs: tuple[tuple[Node, ...], ...]
    operands: tuple[tuple[Node, ...], ...]
    results: tuple[int, ...]


@dataclass(frozen=True)
class _Search:
    """position: in the graph. alike: see `Alike`. doing: what a node does, to be compared."""

    position: dict[Node, int]
    alike: Alike
    doing: Callable[[Node], Any]


def find_groups(graph: Graph, *, own_attributes: bool = False) -> list[Group] | None:
    """All computing nodes of the graph in order, or None where nothing repeats or cannot be cut.

    A cut is only made through tensors of constant size: sizes that depend on the data stay inside.
    own_attributes: each run may have attributes of the graph's module of its own, uncompared.
    """
    order = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    if any(n.op not in ("call_function", "call_method") for n in order):
        return None
    position = {node: i for i, node in enumerate(graph.nodes)}
    search = _Search(position, _alike_or_attributes if own_attributes else _alike, cache(doing))
    # as it stands first: of two that save as much, the one with nothing moved
    ways = [_groups(each, search) for each in (order, _picks_first(order))]
    groups = max((w for w in ways if all(_can_be_cut(g) for g in w)), key=_saved, default=[])
    return groups if _saved(groups) else None


def _saved(groups: Sequence[Group]) -> int:
    """Nodes that need no compiling, being done elsewhere already."""
    return sum((len(g.runs) - 1) * len(g.runs[0]) for g in groups)


def _picks_first(order: Sequence[Node]) -> list[Node]:
    picks = parts_of_inputs(order)
    return [*picks, *(n for n in order if n not in picks)]


def parts_of_inputs(order: Sequence[Node]) -> dict[Node, None]:
    """Nodes that only pick a part of an input, in order; of constant size, and without a copy.

    None of an input that the graph writes to: views of it have to be made by who writes. None at
    all where what is written is not known.
    """
    if any(_writes_unseen(n) for n in order if n.op in ("call_function", "call_method")):
        return {}
    written = {_storage(n) for node in order for n in _written(node)}
    picks: dict[Node, None] = {}
    for node in order:
        source = node.args[0] if node.target in PICKS else None
        if isinstance(source, Node) and (source.op == "placeholder" or source in picks):
            constant = _fixed(node) is not None and _is_view(node)
            if constant and _storage(source) not in written:
                picks[node] = None
    return picks


def _is_view(node: Node) -> bool:
    """Whether all but the first argument are constants, and no list: rows by number are a copy."""
    return len(node.all_input_nodes) == 1 and not any(
        isinstance(leaf, (list, tuple)) for leaf in _items(node.args[1:])
    )


def _items(index: Any) -> list[Any]:
    """The parts of `x[index]`."""
    return [part for each in index for part in (each if isinstance(each, tuple) else (each,))]


def _writes_unseen(node: Node) -> bool:
    """Whether a node without a schema, as Dynamo's are, writes to what it is given."""
    if node.target in IN_PLACE or node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") and getattr(node.target, "__module__", "") != "_operator"  # and_


def _groups(order: Sequence[Node], search: _Search) -> list[Group]:
    """Runs that repeat, and what is before, between and behind them as runs of their own."""
    if not order:
        return []
    for start, length, count in _candidates(order, search):
        end = start + count * length
        runs = tuple(tuple(order[i : i + length]) for i in range(start, end, length))
        if group := _group(runs, search):
            before, behind = order[:start], order[end:]
            return [*_groups(before, search), group, *_groups(behind, search)]
    alone = _group((tuple(order),), search)
    assert alone is not None  # one run does the same as itself
    return [alone]


def _candidates(order: Sequence[Node], search: _Search) -> list[tuple[int, int, int]]:
    """(start, length, count) of what looks like runs, those that save most nodes first."""
    labels = [search.doing(n) for n in order]
    places: dict[Any, list[int]] = defaultdict(list)
    for i, label in enumerate(labels):
        places[label].append(i)
    gaps = Counter(b - a for found in places.values() for a, b in zip(found, found[1:]))
    periods = [gap for gap, _ in gaps.most_common() if gap >= MIN_LENGTH][:PERIODS]
    found = []
    for length in periods:
        for begin, end in _stretches(labels, length):
            count = (end - begin) // length
            if count >= MIN_RUNS:
                slack = (end - begin) - count * length
                start = min(
                    range(begin, begin + slack + 1), key=lambda s: _crossing(order, s, length)
                )
                found.append((start, length, count))
                if count > MIN_RUNS:  # what comes into the first run often looks another way
                    found.append((start + length, length, count - 1))
    return sorted(found, key=lambda c: (-c[1] * (c[2] - 1), c[1]))


def _stretches(labels: Sequence[Any], length: int) -> list[tuple[int, int]]:
    """Longest [begin, end) in which every label is that of `length` places before or behind it."""
    found, begin = [], None
    for i in range(len(labels) - length + 1):
        equal = i + length < len(labels) and labels[i] == labels[i + length]
        if equal and begin is None:
            begin = i
        elif not equal and begin is not None:
            found.append((begin, i + length))
            begin = None
    return found


def _crossing(order: Sequence[Node], start: int, length: int) -> float:
    """Bytes that the first run hands on; infinite where it cannot be cut there."""
    run = order[start : start + length]
    inside = set(run)
    crossing = [n for n in run if any(user not in inside for user in n.users)]
    return sum(_bytes(n) for n in crossing)


def _bytes(node: Node) -> float:
    value = _fixed(node)
    return float("inf") if value is None else value.numel() * value.element_size()


def _fixed(node: Node) -> Tensor | None:
    """The node's fake value, ATen's or Dynamo's, if it is a tensor of constant size."""
    value = node.meta.get("val", node.meta.get("example_value"))
    if not isinstance(value, Tensor):
        return None
    constant = all(type(size) is int for size in (*value.shape, *value.stride()))
    return value if constant else None


def _group(runs: tuple[tuple[Node, ...], ...], search: _Search) -> Group | None:
    """The runs with what they take and give; None where they do not do the same.

    Operands stand in the graph's order: what a piece writes, AOTAutograd writes back
    in the order of its inputs, and a history moves on oldest first.
    """
    places = [{node: i for i, node in enumerate(run)} for run in runs]
    slots: dict[tuple[Node, ...], None] = {}
    for nodes in zip(*runs, strict=True):
        if any(search.doing(n) != search.doing(nodes[0]) for n in nodes[1:]):
            return None
        for given in zip(*(inputs_of(n) for n in nodes), strict=True):
            at = {place.get(n) for place, n in zip(places, given, strict=True)}
            if len(at) > 1:
                return None
            if at == {None}:
                slots[given] = None
    if not all(search.alike(given) for given in slots):
        return None
    results = {
        i
        for run, place in zip(runs, places, strict=True)
        for i, node in enumerate(run)
        if any(user not in place for user in node.users)
    }
    ordered = sorted(slots, key=lambda given: search.position[given[0]])
    operands = tuple(zip(*ordered, strict=True)) if ordered else tuple(() for _ in runs)
    return Group(runs, operands, tuple(sorted(results)))


def _alike(given: Sequence[Node]) -> bool:
    """Whether one compiled run may take all of these in one place."""
    if len(set(given)) == 1:
        return True
    kinds = {_kind(n) for n in given}
    return len(kinds) == 1 and None not in kinds


def _alike_or_attributes(given: Sequence[Node]) -> bool:
    return all(n.op == "get_attr" for n in given) or _alike(given)


def _kind(node: Node) -> Any:
    value = _fixed(node)
    if node.op == "get_attr" or value is None:
        return None
    return value.dtype, value.device, tuple(value.shape), value.stride(), value.requires_grad


def _can_be_cut(group: Group) -> bool:
    """Whether only tensors of constant size go in and out, and what is written is nowhere else."""
    crossing = [n for given in group.operands for n in given]
    crossing += [run[i] for run in group.runs for i in group.results]
    if not all(n.op == "get_attr" or _fixed(n) is not None for n in crossing):
        return False
    return all(_writes_apart(*each) for each in zip(group.runs, group.operands, strict=True))


def _writes_apart(run: Sequence[Node], operands: Sequence[Node]) -> bool:
    """Whether no two operands share memory that the run writes to."""
    written = {storage for node in run for storage in map(_storage, _written(node))}
    given = Counter(_storage(n) for n in operands)
    return all(given[storage] <= 1 for storage in written)


def _written(node: Node) -> list[Node]:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    named = zip(schema.arguments, node.args)
    pairs = [*named, *((a, node.kwargs[a.name]) for a in schema.arguments if a.name in node.kwargs)]
    return [n for a, n in pairs if a.is_write and isinstance(n, Node)]


def _storage(node: Node) -> Any:
    """What two values have in common that share memory, as far as tracing saw it."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return node
    return storage_of(value)
