"""Ways to extrapolate the model's output, and their errors from inner products alone.

A predictor is a weighted sum of stored outputs o_j and samples x_j (newest first) and the sample
x now:  o = sum_j c_j o_j + e x + sum_j e_j x_j,  with e + sum_j e_j = 0.

    output    polynomial through the outputs (velocity or noise, whatever the model predicts)
    clean     rectified flow: the clean image x - t v is what stays smooth
    noise     rectified flow: the noise x + (1 - t) v is what stays smooth
    response  last output + gain * (x - x_0), gain found at the last refresh

At a refresh the graph returns the inner products of BASIS; which predictor would have been how
wrong is then arithmetic on a few numbers, whatever was really used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moeca_compile.policies.ending import THOUSAND
from moeca_compile.policies.trail import Trail

PREDICTIONS = ("output", "clean", "noise", "response")


@dataclass(frozen=True)
class Predictor:
    """outputs: c_j [depth]; now: e; samples: e_j [depth]. kind, order: what it was made as."""

    kind: str
    order: int
    outputs: tuple[float, ...]
    now: float = 0.0
    samples: tuple[float, ...] = ()

    @property
    def mix(self) -> tuple[float, ...]:
        """As the skip graph takes it: c_j, e, e_j."""
        samples = self.samples or (0.0,) * len(self.outputs)
        return (*self.outputs, self.now, *samples)

    def coordinates(self) -> list[float]:
        """new output - prediction, in the order of `basis_size`: products with the Gram matrix.

        Basis: new - o_0, o_0, o_0 - o_1, ..., [x - x_0, x_0 - x_1, ...].
        """
        c, e = self.outputs, self.samples or (0.0,) * len(self.outputs)
        steps = [sum(c[k + 1 :]) for k in range(len(c) - 1)]
        moves = [sum(e[k + 1 :]) for k in range(len(e) - 1)]
        return [1.0, 1.0 - sum(c), *steps, -self.now, *moves]


def make_predictor(
    kind: str, order: int, trail: Trail, now: float, depth: int, gain: float
) -> Predictor | None:
    """The predictor at time `now`; None where it is not defined (no refresh yet, t = 0)."""
    if not trail.times:
        return None
    weights = [*trail.weights(now, order), *[0.0] * (depth - len(trail.times))]
    times = [*trail.times, *[0.0] * (depth - len(trail.times))]
    if kind == "output":
        return Predictor(kind, order, tuple(weights))
    if kind == "response":
        first = (1.0, *[0.0] * (depth - 1))
        return Predictor(kind, 0, first, gain, (-gain, *[0.0] * (depth - 1)))
    scale = THOUSAND if max(now, *times) > 1.0 else 1.0
    ends = [t / scale if kind == "clean" else t / scale - 1.0 for t in (now, *times)]
    here, there = ends[0], ends[1:]
    if abs(here) < 1e-6:
        return None
    return Predictor(
        kind,
        order,
        tuple(w * t / here for w, t in zip(weights, there)),
        1.0 / here,
        tuple(-w / here for w in weights),
    )


@dataclass(frozen=True)
class Gram:
    """Inner products of BASIS at a refresh, as the graph returned them."""

    depth: int
    numbers: tuple[float, ...]

    @property
    def size(self) -> int:
        return math.isqrt(len(self.numbers))

    @property
    def has_samples(self) -> bool:
        """Whether the graph could store the sample (the output has its shape)."""
        return self.size == 2 * self.depth + 1

    def at(self, row: int, column: int) -> float:
        return self.numbers[row * self.size + column]

    @property
    def output_norm(self) -> float:
        """l2 norm of the new output."""
        squared = self.at(0, 0) + 2 * self.at(0, 1) + self.at(1, 1)
        return math.sqrt(max(squared, 0.0))

    def change(self) -> float:
        """|new - o_0| / |new|: of the output since the last refresh; infinite where unknown."""
        return _ratio(self.at(0, 0), self.output_norm)

    def move(self) -> float:
        """|x - x_0| / |new|: of the sample since the last refresh; infinite where unknown."""
        if not self.has_samples:
            return math.inf
        return _ratio(self.at(self.depth + 1, self.depth + 1), self.output_norm)

    def error(self, predictor: Predictor) -> float:
        """|new - prediction| / |new|; infinite where the numbers say nothing (NaN, no sample)."""
        if predictor.kind != "output" and not self.has_samples:
            return math.inf
        x = predictor.coordinates()[: self.size]
        used = [i for i, value in enumerate(x) if value != 0.0]
        squared = sum(x[i] * x[j] * self.at(i, j) for i in used for j in used)
        norm = self.output_norm
        if not math.isfinite(squared) or not norm > 0.0:
            return math.inf
        return math.sqrt(max(squared, 0.0)) / norm

    def gain(self) -> float:
        """Least squares of the output's change on the sample's; 0 where there is none."""
        if not self.has_samples:
            return 0.0
        move = self.depth + 1
        across, along = self.at(0, move), self.at(move, move)
        return across / along if along > 0.0 and math.isfinite(across / along) else 0.0

    def alignment(self) -> float:
        """Cosine of the sample's last two moves: near 1 along an ODE, near 0 where a sampler adds
        noise; NaN where unknown."""
        if not self.has_samples or self.depth < 2:
            return math.nan
        move = self.depth + 1
        product = self.at(move, move) * self.at(move + 1, move + 1)
        return self.at(move, move + 1) / math.sqrt(product) if product > 0.0 else math.nan


def _ratio(squared: float, norm: float) -> float:
    return math.sqrt(squared) / norm if norm > 0.0 and 0.0 <= squared < math.inf else math.inf
