"""Samplers against exact solutions, and noise that a coarser run shares.

one image, known   -> every sampler ends at it
v(x, t) = x        -> x(0) = x(1) / e, Heun closer than Euler
as many cells      -> the epsilon subject draws what fashion_epsilon's own samplers draw
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moeca_compile.bench.samplers import (
    SharedNoise,
    ancestral,
    euler,
    from_velocity,
    heun,
    straight_path,
)

EXAMPLES = Path(__file__).parents[2] / "examples"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latent(seed: int = 0) -> Tensor:
    return torch.randn(2, 1, 4, 4, generator=seeded(seed))


def towards(image: Tensor) -> Callable[[Tensor, float], Tensor]:
    """The velocity of a data set of one image."""
    return lambda x, t: (x - image) / t


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_ancestral_ends_at_the_only_image_there_is(eta: float, steps: int) -> None:
    image = latent(7)
    noise = SharedNoise(seeded(1), cells=10, steps=steps)
    end = ancestral(from_velocity(towards(image)), latent(), straight_path(steps), eta, noise)
    torch.testing.assert_close(end, image, atol=1e-5, rtol=0)


def test_without_noise_ancestral_is_euler() -> None:
    def velocity(x: Tensor, t: float) -> Tensor:
        return x.tanh() * (1 + t)

    noise = SharedNoise(seeded(1), 6, 6)
    still = ancestral(from_velocity(velocity), latent(), straight_path(6), 0.0, noise)
    torch.testing.assert_close(still, euler(velocity, latent(), 6))


def test_ancestral_noise_keeps_the_variance_of_the_path() -> None:
    """A data set of standard normal images: x stays normal with variance alpha^2 + sigma^2."""

    def velocity(x: Tensor, t: float) -> Tensor:
        return x * (t - (1 - t)) / (t * t + (1 - t) * (1 - t))

    x = torch.randn(20_000, generator=seeded())
    path = straight_path(200)
    noise = SharedNoise(seeded(1), 200, 200)
    end = ancestral(from_velocity(velocity), x, path, 1.0, noise)
    assert end.std().item() == pytest.approx(1.0, abs=0.03)
    assert torch.corrcoef(torch.stack([x, end]))[0, 1].abs() < 0.1  # eta 1 forgets the start


def test_heun_is_of_second_order_and_calls_twice() -> None:
    calls = []

    def velocity(x: Tensor, t: float) -> Tensor:
        calls.append(t)
        return x

    x = torch.ones(1).double()
    errors = [abs(heun(velocity, x, n).item() - math.exp(-1)) for n in (10, 20)]
    assert len(calls) == 19 + 39
    assert errors[1] < abs(euler(velocity, x, 40).item() - math.exp(-1))
    assert errors[0] > errors[1]


@pytest.mark.parametrize("steps", [1, 3, 5, 7, 12])
def test_fewer_steps_get_the_sums_of_the_same_noises(steps: int) -> None:
    like = torch.zeros(3)
    fine, coarse = SharedNoise(seeded(), 12, 12), SharedNoise(seeded(), 12, steps)
    cells = [fine.draw(i, like) for i in range(12)]
    edges = [round(i * 12 / steps) for i in range(steps + 1)]
    for index, (start, end) in enumerate(zip(edges, edges[1:])):
        expected = torch.stack(cells[start:end]).sum(0) / math.sqrt(end - start)
        assert torch.equal(coarse.draw(index, like), expected)


def test_more_steps_than_cells_get_noise_too() -> None:
    noise = SharedNoise(seeded(), cells=2, steps=5)
    assert all(noise.draw(i, torch.zeros(4)).std() > 0 for i in range(5))


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_epsilon_subject_is_the_sampler_beside_its_model(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    monkeypatch.delitem(sys.modules, "subjects", raising=False)  # tests/cli have one, too
    import subjects
    from fashion_epsilon import sampler

    subject = subjects.epsilon()
    subject.methods[name] = partial(subject.methods[name], cells=4)  # a noise of its own per step
    ours = subject.sample(subject.model, name, 3, 2, steps=4)
    method = getattr(sampler, name)
    theirs = method(subject.model, torch.tensor([0, 1]), 4, subjects.CFG_SCALE, seeded(3))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("factory", ["ditmoe", "finegrained"])
def test_velocity_subjects_are_the_samplers_beside_their_models(
    monkeypatch: pytest.MonkeyPatch, factory: str
) -> None:
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    monkeypatch.delitem(sys.modules, "subjects", raising=False)  # tests/cli have one, too
    import subjects
    from fashion_ditmoe.sampler import sample

    subject = getattr(subjects, factory)()
    ours = subject.sample(subject.model, "euler", 3, 2, 3)
    model = subject.model

    def call(x: Tensor, t: Tensor, y: Tensor, _: None) -> Tensor:
        return model(x, t, y)

    call.cfg = subjects.ditmoe().model.cfg  # type: ignore[attr-defined]  sizes of images
    theirs = sample(call, torch.tensor([0, 1]), 3, subjects.CFG_SCALE, 3)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert set(subject.methods) == set(subject.samplers)
    assert subject.features(ours).shape == (2, subject.real[0].shape[0])
