"""The ways to run a model that are measured against each other.

eager           the model as it is
Inductor        torch.compile(model): graph breaks included, as the model ships
one graph       this backend with interval=1: no host reads, nothing cached
moeca ...       this backend with options
anything else   a peer the workload brings along
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..bench.candidates import Candidate as Setting
from ..errors import OptionsError

EAGER, INDUCTOR, ONE_GRAPH, PEER, MOECA = "eager", "inductor", "one_graph", "peer", "moeca"
BUDGETED = {"policy": "moeca", "interval": 4, "budget": 0.1, "order": "attention_first"}


@dataclass(frozen=True)
class Candidate:
    """kind: one of the constants above. options: of this backend. name: unique in a run."""

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def cached(self) -> bool:
        """Whether this backend runs it, and counts what it does."""
        return self.kind in (ONE_GRAPH, MOECA)


BASELINES = (
    Candidate("eager", EAGER),
    Candidate("Inductor, as shipped", INDUCTOR),
    Candidate("one graph, nothing cached", ONE_GRAPH, {"interval": 1}),
)


def choose(texts: Sequence[str], peers: Sequence[str]) -> list[Candidate]:
    """Baselines, then `texts` ("budget=0.2,interval=3") or the defaults, then peers.

    Raises OptionsError for a bad text.
    """
    settings = [Setting.parse(text) for text in texts]
    if any(s.steps is not None for s in settings):
        raise OptionsError("candidates of one run take the same steps: give steps with --steps")
    chosen = [s.options or {} for s in settings] if texts else [BUDGETED, {}]
    ours = [Candidate(_name(options), MOECA, dict(options)) for options in chosen]
    theirs = [Candidate(name, PEER) for name in peers]
    unique = {c.name: c for c in (*BASELINES, *ours, *theirs)}
    return list(unique.values())


def _name(options: dict[str, Any]) -> str:
    return Setting(options).name if options else "moeca's defaults"
