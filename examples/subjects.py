"""The trained example models as `moeca quality` measures them; one factory per model.

moeca quality examples/subjects.py:ditmoe examples/subjects.py:finegrained --sampler euler

ditmoe, finegrained   velocity   euler 50, stochastic 100 (eta 0.5), stochastic_full 100 (eta 1),
                                 heun 25 (two calls a step)
epsilon               noise      ddim 50, ddpm 100
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from fashion_ditmoe.classifier import load_classifier, run
from safetensors.torch import load_file
from torch import Tensor, nn

from moeca_compile.bench.samplers import (
    Point,
    SharedNoise,
    ancestral,
    euler,
    from_velocity,
    heun,
    straight_path,
)

EXAMPLES = Path(__file__).parent
CFG_SCALE = 1.5
CLASSES = 10
SHOWN = 4  # images of `generate`, for the commands that follow one generation

# (guided prediction of (x, t), first latent, steps, generator) -> images
Method = Callable[[Callable[[Tensor, float], Tensor], Tensor, int, torch.Generator], Tensor]


@dataclass
class FashionSubject:
    """A class-conditional Fashion-MNIST model; image i of a generation shows class i % 10."""

    name: str
    model: nn.Module
    samplers: dict[str, int]
    methods: dict[str, Method]
    time: Callable[[float, int], Tensor]  # (t, rows) -> what the model takes
    peak: float = 2.0
    settings: dict[str, Any] = field(default_factory=lambda: {"cfg_scale": CFG_SCALE})

    def sample(self, model: Any, sampler: str, seed: int, samples: int, steps: int) -> Tensor:
        """Images [samples, 1, 32, 32] in [-1, 1]."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(samples, 1, 32, 32, generator=generator)
        labels = torch.arange(samples) % CLASSES
        both = torch.cat([labels, torch.full_like(labels, CLASSES)])  # CLASSES: no class

        def guided(x: Tensor, t: float) -> Tensor:
            out = model(torch.cat([x, x]), self.time(t, len(both)), both)
            cond, uncond = out.chunk(2)
            return uncond + CFG_SCALE * (cond - uncond)

        with torch.no_grad():
            return self.methods[sampler](guided, x, steps, generator).clamp(-1, 1)

    def generate(self) -> Tensor:
        """A few images with `.model` and the first sampler."""
        name, steps = next(iter(self.samplers.items()))
        return self.sample(self.model, name, 0, SHOWN, steps)

    @cached_property
    def _judge(self) -> nn.Module:
        return load_classifier(EXAMPLES / "fashion_ditmoe" / "classifier.safetensors")

    def accuracy(self, images: Tensor) -> float:
        """Share of images that the classifier takes for their class (it is right in 92.7 %)."""
        labels = torch.arange(len(images)) % CLASSES
        return (run(self._judge, images)[1] == labels).double().mean().item()

    def features(self, images: Tensor) -> Tensor:
        """The classifier's 64 features, [N, 64]."""
        return run(self._judge, images)[0]

    @cached_property
    def real(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the features of the 10,000 test images."""
        found = load_file(EXAMPLES / "fashion_ditmoe" / "test_moments.safetensors")
        return found["mean"], found["covariance"]


def ditmoe() -> FashionSubject:
    """8 experts, top-2, softmax."""
    from fashion_ditmoe.model import load_model

    return _velocity("ditmoe", load_model(EXAMPLES / "fashion_ditmoe"))


def finegrained() -> FashionSubject:
    """16 small experts, top-4, sigmoid gates, renormalised."""
    from fashion_finegrained.model import load_model

    return _velocity("finegrained", load_model(EXAMPLES / "fashion_finegrained"))


def epsilon() -> FashionSubject:
    """Noise prediction on 1000 discrete timesteps."""
    from fashion_epsilon.model import load_model

    return FashionSubject(
        "epsilon",
        load_model(EXAMPLES / "fashion_epsilon"),
        samplers={"ddim": 50, "ddpm": 100},
        methods={"ddim": partial(_noise, eta=0.0), "ddpm": partial(_noise, eta=1.0)},
        time=lambda t, rows: torch.full((rows,), round(t), dtype=torch.int64),
    )


def _velocity(name: str, model: nn.Module) -> FashionSubject:
    samplers = {"euler": 50, "stochastic": 100, "stochastic_full": 100, "heun": 25}
    return FashionSubject(
        name,
        model,
        samplers,
        methods={
            "euler": lambda v, x, steps, _: euler(v, x, steps),
            "heun": lambda v, x, steps, _: heun(v, x, steps),
            "stochastic": partial(_stochastic, eta=0.5, cells=samplers["stochastic"]),
            "stochastic_full": partial(_stochastic, eta=1.0, cells=samplers["stochastic_full"]),
        },
        time=lambda t, rows: torch.tensor(t).expand(rows),
    )


def _stochastic(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    steps: int,
    generator: torch.Generator,
    *,
    eta: float,
    cells: int,
) -> Tensor:
    noise = SharedNoise(generator, cells, steps)
    return ancestral(from_velocity(velocity), x, straight_path(steps), eta, noise)


def _noise(
    predict: Callable[[Tensor, float], Tensor],
    x: Tensor,
    steps: int,
    generator: torch.Generator,
    *,
    eta: float,
    cells: int = 100,
) -> Tensor:
    """fashion_epsilon's `ddim` (eta 0) and `ddpm` (eta 1), with noise that fewer steps share."""
    from fashion_epsilon.schedule import alpha_bars, spaced

    times = spaced(steps)
    levels = alpha_bars()[times].tolist()
    path = [Point(t, math.sqrt(a), math.sqrt(1 - a)) for t, a in zip(times.tolist(), levels)]
    path.append(Point(-1, 1.0, 0.0))  # the image itself, where the model is not asked

    def denoise(x: Tensor, point: Point) -> tuple[Tensor, Tensor]:
        eps = predict(x, point.t)
        clean = ((x - point.sigma * eps) / point.alpha).clamp(-1, 1)
        return clean, (x - point.alpha * clean) / point.sigma

    return ancestral(denoise, x, path, eta, SharedNoise(generator, cells, steps))
