"""What a user supplies to be measured: a model, and how to sample with it.

def my_model():                         # file.py:my_model on the command line
    return object with
        .model                          the denoiser, a torch.nn.Module in eval mode
        .samplers                       {"euler": 50}: names and default numbers of steps
        .sample(model, sampler, seed, samples, steps) -> images [samples, C, H, W]
    and, where it makes sense,
        .peak                           span of the values; 2.0 (for [-1, 1]) without
        .settings                       what else changes the images, e.g. {"cfg_scale": 1.5}
        .accuracy(images) -> float      share that shows what was asked for
        .features(images) -> [N, F]     for the Frechet distance
        .real                           (mean [F], covariance [F, F]) of real images' features

All randomness of `sample` comes from `seed`: candidates are compared image by image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import MoecaError, name_nearest

EXPECTED = "expected .model, .samplers and .sample(model, sampler, seed, samples, steps)"


class Sampling(Protocol):
    """The part of a user's object that has to be there."""

    model: nn.Module
    samplers: Mapping[str, int]

    def sample(self, model: Any, sampler: str, seed: int, samples: int, steps: int) -> Tensor:
        """Images [samples, C, H, W]; `model` is called in the place of `.model`."""
        ...


@dataclass(frozen=True)
class Subject:
    """A user's object, looked at once. make: another one, whose model nothing was done to yet.

    weights: hex digest of every parameter and buffer.
    """

    name: str
    make: Callable[[], Sampling]
    first: Sampling
    samplers: dict[str, int]
    weights: str
    peak: float = 2.0
    settings: dict[str, Any] = field(default_factory=dict)

    def steps_of(self, sampler: str) -> int:
        """Default number of steps. Raises MoecaError naming the nearest sampler."""
        if sampler not in self.samplers:
            nearest = name_nearest(sampler, self.samplers)
            raise MoecaError(f"{self.name} has no sampler {sampler!r}{nearest}")
        return self.samplers[sampler]

    def accuracy(self, images: Tensor) -> float | None:
        """Share of images that show what was asked for; None if the user's object cannot tell."""
        judge = getattr(self.first, "accuracy", None)
        return None if judge is None else float(judge(images))


def look_at(name: str, make: Callable[[], Any]) -> Subject:
    """Call the factory and check what it returned. Raises MoecaError with what is missing."""
    made = make()
    missing = [part for part in ("model", "samplers", "sample") if not hasattr(made, part)]
    if missing:
        kind = type(made).__name__
        raise MoecaError(f"{name}() returned {kind} without {', '.join(missing)}: {EXPECTED}")
    if not isinstance(made.model, nn.Module):
        kind = type(made.model).__name__
        raise MoecaError(f"{name}().model: expected a torch.nn.Module, got {kind}")
    return Subject(
        name=getattr(made, "name", name),
        make=make,
        first=made,
        samplers=dict(made.samplers),
        weights=weights_digest(made.model),
        peak=float(getattr(made, "peak", 2.0)),
        settings=dict(getattr(made, "settings", {})),
    )


def weights_digest(model: nn.Module) -> str:
    """16 hex digits that change with any name, dtype, shape or value of the model's state."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class Counted:
    """A model as the sampler sees it: counts its calls; everything else is the model's."""

    def __init__(self, model: Callable[..., Any], on_call: Callable[[], None]) -> None:
        self._model = model
        self._on_call = on_call
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self._on_call()
        return self._model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _FirstCall(BaseException):
    """Leaves a sampling loop at its first call; no Exception, so that no sampler swallows it."""


def first_call(made: Sampling, sampler: str, samples: int, steps: int) -> tuple[tuple, dict]:
    """Positional and keyword arguments of the first call a generation makes.

    Raises MoecaError if it makes none.
    """
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        raise _FirstCall

    handle = made.model.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with torch.no_grad():
            made.sample(made.model, sampler, 0, samples, steps)
    except _FirstCall:
        return caught[0]
    finally:
        handle.remove()
    raise MoecaError(f"sample(..., {sampler!r}, ...) ended without calling the model")
