"""A layer that does what one before it did is not traced again: its part of the graph is copied.

    layer 1 traced    norm_1 -> guard_1 -> write(cache 1) -> combine_1
    layer 2 copied    norm_2 -> guard_2 -> write(cache 2) -> combine_2     other weights and caches

Tracing costs milliseconds an operation, and a reuse step has hundreds of them a layer. Whether two
layers do the same is asked of the model's graph and of their plans (graph/counterparts.py): all
that a layer's part is made from. What differs in anything is traced. Where blocks repeat, what they
take from outside is worked out before each (`taken_by_blocks`), so that already the first layer is
nothing but a layer; elsewhere it holds what is before all of them, and the second is the first one
copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import SymBool, SymFloat, SymInt, Tensor
from torch.fx import GraphModule, Node

from ..graph.counterparts import Counterparts, Different
from ..graph.evaluate import Evaluator
from ..graph.region import ORIGIN
from ..graph.repeats import find_groups
from ..torch_compat import Trace, leaves, map_leaves
from .cache_plan import CachePlan, row_specs

if TYPE_CHECKING:
    from ..options import Options
    from .insert_cache import VariantInputs
    from .reuse_layer import ReuseLayer

SYMBOLS = (SymInt, SymFloat, SymBool)
PATTERNS = 3  # kinds of layers that take turns, at most

Key = tuple[Any, ...]  # of a value that a layer may read: ("node", node, 0), ("cache", name), ...


@dataclass(frozen=True)
class Part:
    """What tracing one layer added. known: nodes that had a value before; values: of those that got
    one; found: what the caller wants of the layer; stands: id of their tensors -> its node.

    read: which node each value stood for that the layer might read. moved: what it stands for now,
    where that is another one: an op that changes nothing hands its operand on.
    """

    number: int
    known: frozenset[Node]
    values: dict[Node, Any]
    nodes: tuple[Node, ...]
    found: tuple[Tensor, ...]
    stands: dict[int, Node]
    read: dict[Key, Node]
    moved: dict[Key, Node]

    @property
    def operands(self) -> set[Node]:
        """Nodes from outside that it reads."""
        inside = set(self.nodes)
        return {n for node in self.nodes for n in node.all_input_nodes} - inside


def taken_by_blocks(gm: GraphModule, plan: CachePlan, whole: bool) -> dict[Node, list[Node]]:
    """By the end of the first layer of each block that repeats: what the block takes from outside.

    With that in hand, the first layer is traced without what is before all of them, and every
    later one without what is left of the block before it: they do the same, and are copied.
    whole: whether every value is needed with all its rows.
    """
    ends = [layer.region.combine for layer in plan.layers]
    found: dict[Node, list[Node]] = {}
    repeats = find_groups(gm.graph, own_attributes=True) or ()
    for group in (each for each in repeats if len(each.runs) > 1):
        for run, operands in zip(group.runs, group.operands, strict=True):
            inside = set(run)
            first = next((end for end in ends if end in inside), None)
            if first is not None:
                made = [n for n in operands if n.op == "call_function"]
                found[first] = [n for n in made if whole or n in plan.needed]
    return found


class CopiedLayers:
    """Builds the layers of one variant being traced, each by copying where that is the same.

    reuse: the layers' builders, in a reuse variant.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        plan: CachePlan,
        options: Options,
        extra: VariantInputs,
        reuse: list[ReuseLayer],
        trace: Trace,
    ):
        self.copied = 0
        self._evaluator = evaluator
        self._plan = plan
        self._options = options
        self._extra = extra
        self._reuse = reuse
        self._trace = trace
        self._parts: list[Part] = []
        self._histories = {h.node: h for h in plan.histories.layers}
        self._replaced = evaluator.replaced
        attention = [a.region for layer in plan.layers for a in layer.attention]
        self._beside = {part.node: part for region in attention for part in region.beside}

    def build(self, number: int, trace: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `trace` returns for layer `number`, and the nodes it adds: `trace`d, or copied."""
        for part in reversed(self._parts[-PATTERNS:]):
            try:
                found = self._copy(part, number)
            except Different:
                continue
            self.copied += 1
            return found
        known = frozenset(self._evaluator.known)
        sources = self._sources(number)
        read = self._standing_for(sources)
        last = self._trace.last
        found = trace()
        value = self._evaluator.value
        values = {n: value(n) for n in self._evaluator.known if n not in known}
        nodes = tuple(self._trace.behind(last))
        after = self._standing_for(sources)
        moved = {key: node for key, node in after.items() if read.get(key) is not node}
        made = {id(v): v for v in leaves((values, found))[0] if isinstance(v, Tensor)}
        stands = self._standing_for(made)
        self._parts.append(Part(number, known, values, nodes, found, stands, read, moved))
        return found

    def _sources(self, number: int, nodes: Iterable[Node] | None = None) -> dict[Key, Tensor]:
        """All tensors from outside that building layer `number` may read; nodes: those among the
        known ones that it does read."""
        found: dict[Key, Any] = {}
        for node in self._evaluator.known if nodes is None else nodes:
            value = self._evaluator.value(node)
            found |= {("node", node, i): leaf for i, leaf in enumerate(leaves(value)[0])}
        found |= {("cache", name): cache for name, cache in self._extra.caches.items()}
        if self._reuse:
            counts = self._reuse[number].inputs.counts
            found |= {("count", i): count for i, count in enumerate(counts)}
        clock = self._extra.clock
        everywhere = (self._extra.mix, *([] if clock is None else [clock.now, clock.known]))
        found |= {("everywhere", i): value for i, value in enumerate(everywhere)}
        return {key: value for key, value in found.items() if isinstance(value, Tensor)}

    def _standing_for(self, values: dict[Any, Tensor]) -> dict[Any, Node]:
        nodes = {key: self._trace.node(value) for key, value in values.items()}
        return {key: node for key, node in nodes.items() if node is not None}

    def _copy(self, part: Part, number: int) -> tuple[Tensor, ...]:
        """Raises Different, before anything is added, where the layer is another one."""
        pairs = self._pairs(part, number)
        if any(isinstance(v, SYMBOLS) for value in part.values.values() for v in leaves(value)[0]):
            raise Different
        same = self._same_source(part, number, pairs)
        keys = {key: same(key) for key in part.read}
        nodes = dict.fromkeys(k[1] for k in keys.values() if k is not None and k[0] == "node")
        sources = self._sources(number, filter(self._evaluator.has, nodes))
        now = {key: sources[k] for key, k in keys.items() if k is not None and k in sources}
        operands: dict[Node, Tensor] = {}
        for key, value in now.items():
            before = operands.setdefault(part.read[key], value)
            if self._trace.node(before) is not self._trace.node(value):
                raise Different
        if not part.operands <= operands.keys() or not part.moved.keys() <= now.keys():
            raise Different
        made = self._append(part, pairs, operands)
        stand_ins: dict[Node, Tensor] = {}

        def image(value: Any) -> Any:
            node = part.stands.get(id(value))
            if node is None or node not in made:
                return value if node is None else operands[node]
            if node not in stand_ins:
                stand_ins[node] = self._trace.stand_for(made[node], value)
            return stand_ins[node]

        for key, node in part.moved.items():
            self._trace.take(now[key], made[node])
            stand_ins[node] = now[key]
        for node, value in part.values.items():
            self._evaluator.adopt(pairs.of[node], partial(map_leaves, image, value))
        return tuple(image(value) for value in part.found)

    def _pairs(self, part: Part, number: int) -> Counterparts:
        one, other = self._plan.layers[part.number], self._plan.layers[number]
        pairs = Counterparts(self._evaluator.gm, part.known.__contains__, self._evaluator.has)
        pairs.pair(one.region.combine, other.region.combine)
        pairs.pair(one, other)
        pairs.settle()
        if any(self._treatment(a) != self._treatment(b) for a, b in pairs.of.items()):
            raise Different
        region = one.region
        own = {*one.roots, *region.routing, region.routed, region.combine, *self._beside}
        replaced = part.values.keys() & self._replaced
        if not part.values.keys() <= pairs.of.keys() or not replaced <= own:
            raise Different  # another layer's plan, which nobody compared, has a say in it
        return pairs

    def _treatment(self, node: Node) -> tuple[Any, ...]:
        """What a variant does about the node, whichever layer it belongs to."""
        history, part = self._histories.get(node), self._beside.get(node)
        return (
            node in self._plan.needed,
            node in self._replaced,
            history and (history.depth, history.kind),
            part and (part.layout, part.space, part.start),
        )

    def _same_source(
        self, part: Part, number: int, pairs: Counterparts
    ) -> Callable[[Key], Key | None]:
        """From what the layer of `part` may read to what layer `number` reads in its place."""
        layers = self._plan.layers[part.number], self._plan.layers[number]
        specs = [row_specs(layer, self._options) for layer in layers]
        names = {a.name: b.name for a, b in zip(*specs, strict=True)}
        for node, history in self._histories.items():
            if node in pairs.of:  # of the same depth, as their treatment is the same
                names |= zip(history.fields, self._histories[pairs.of[node]].fields, strict=True)

        def same(key: Key) -> Key | None:
            if key[0] == "node":
                return ("node", pairs.of[key[1]], key[2]) if key[1] in pairs.of else None
            if key[0] == "cache":
                return ("cache", names[key[1]]) if key[1] in names else None
            return key

        return same

    def _append(
        self, part: Part, pairs: Counterparts, operands: dict[Node, Tensor]
    ) -> dict[Node, Node]:
        """The nodes of `part` once more, on other operands: {node: its copy}."""
        origins = {_origin(a): b for a, b in (*pairs.inside(), *pairs.of.items())}
        given = {node: self._trace.node(value) for node, value in operands.items()}
        made: dict[Node, Node] = {}

        def operand(node: Node) -> Node:
            found = made[node] if node in made else given[node]
            assert found is not None  # it takes the place of a node, so it stands for one
            return found

        for node in part.nodes:
            copy = made[node] = self._trace.copy(node, operand)
            if source := origins.get(_origin(node)):
                copy.meta.update({k: source.meta[k] for k in ORIGIN if k in source.meta})
        return made


def _origin(node: Node) -> tuple[str, str]:
    stack, trace = (node.meta.get(k) for k in ORIGIN)
    return str(stack and list(stack.items())), str(trace)
