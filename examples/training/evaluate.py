"""Quality of a trained example: does a classifier see the asked class, and are features like real?

    python -m examples.training.evaluate epsilon --samples 200 --steps 50 --cfg-scale 1.5
    ->  epsilon ddim 50 steps, CFG 1.5, 200 samples: accuracy 0.9.., Frechet ..
        200 test images: accuracy 0.9.., Frechet .. +- ..      (what a perfect model would get)

The classifier and its 64 features are those of examples/fashion_ditmoe; the Frechet distance is to
the features of all 10,000 test images. It falls with the number of samples: compare equal counts.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..fashion_ditmoe.classifier import frechet, load_classifier, run
from ..fashion_epsilon import model as epsilon
from ..fashion_epsilon.sampler import ddim, ddpm
from ..fashion_finegrained import model as finegrained
from ..fashion_finegrained.sampler import sample as euler
from .data import DATA_FOLDER, load_split

EXAMPLES = Path(__file__).parents[1]
Sampler = Callable[[Tensor, int, float, int], Tensor]  # labels, steps, cfg_scale, seed
BATCH = 100


def samplers(folder: Path, name: str) -> dict[str, Sampler]:
    """Every sampler of a model by its name; the first is the default."""
    if name == "finegrained":
        velocity = finegrained.load_model(folder)
        return {"euler": lambda y, steps, scale, seed: euler(velocity, y, steps, scale, seed)}
    noise = epsilon.load_model(folder)

    def seeded(method: Callable[..., Tensor]) -> Sampler:
        return lambda y, steps, scale, seed: method(
            noise, y, steps, scale, torch.Generator().manual_seed(seed)
        )

    return {"ddim": seeded(ddim), "ddpm": seeded(ddpm)}


def generate(sampler: Sampler, labels: Tensor, arguments: argparse.Namespace) -> Tensor:
    """Images for all labels, in batches of their own seeds."""
    parts = tqdm(labels.split(BATCH), ncols=88)
    return torch.cat(
        [
            sampler(part, arguments.steps, arguments.cfg_scale, arguments.seed + index)
            for index, part in enumerate(parts)
        ]
    )


def real_images(arguments: argparse.Namespace) -> tuple[Tensor, str]:
    """Features of the test set, and how as many real images as samples would score."""
    images, labels = load_split(arguments.data, "t10k")
    net = load_classifier(EXAMPLES / "fashion_ditmoe" / "classifier.safetensors")
    features, predicted = run(net, images)
    generator = torch.Generator().manual_seed(arguments.seed)
    picks = [torch.randperm(len(images), generator=generator) for _ in range(10)]
    floor = [frechet(features[pick[: arguments.samples]], features) for pick in picks]
    distances = torch.tensor(floor)
    accuracy = (predicted == labels).double().mean()
    return features, (
        f"{arguments.samples} test images: accuracy {accuracy:.3f}, "
        f"Frechet {distances.mean():.1f} +- {distances.std():.1f}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="quality of a trained example model")
    parser.add_argument("model", choices=("finegrained", "epsilon"))
    parser.add_argument("--folder", type=Path, help="with weights; the example's own by default")
    parser.add_argument("--data", type=Path, default=DATA_FOLDER)
    parser.add_argument("--sampler", choices=("euler", "ddim", "ddpm"))
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cfg-scale", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="also write the images, [N, 1, 32, 32], here")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    folder = arguments.folder or EXAMPLES / f"fashion_{arguments.model}"
    choices = samplers(folder, arguments.model)
    name = arguments.sampler or next(iter(choices))
    if name not in choices:
        raise SystemExit(f"{arguments.model} has no sampler {name!r}; choose {', '.join(choices)}")
    labels = torch.arange(arguments.samples) % 10
    start = time.perf_counter()
    images = generate(choices[name], labels, arguments)
    seconds = time.perf_counter() - start
    net = load_classifier(EXAMPLES / "fashion_ditmoe" / "classifier.safetensors")
    features, predicted = run(net, images)
    real, floor = real_images(arguments)
    accuracy = (predicted == labels).double().mean()
    print(
        f"{arguments.model} {name} {arguments.steps} steps, CFG {arguments.cfg_scale}, "
        f"{arguments.samples} samples: accuracy {accuracy:.3f}, "
        f"Frechet {frechet(features, real):.1f} ({seconds:.0f} s)\n{floor}"
    )
    if arguments.save:
        torch.save(images, arguments.save)


if __name__ == "__main__":
    main()
