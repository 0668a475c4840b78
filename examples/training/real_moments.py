"""Mean and covariance of the classifier's features of the test set, for the Frechet distance.

    python -m examples.training.real_moments
    ->  examples/fashion_ditmoe/test_moments.safetensors    mean [64], covariance [64, 64], float64

34 kB instead of the data set: `moeca quality --frechet` needs nothing else of the real images.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..fashion_ditmoe.classifier import load_classifier, run
from .data import DATA_FOLDER, load_split

FOLDER = Path(__file__).parents[1] / "fashion_ditmoe"


def main() -> None:
    parser = argparse.ArgumentParser(description="moments of real features")
    parser.add_argument("--data", type=Path, default=DATA_FOLDER)
    images, _ = load_split(parser.parse_args().data, "t10k")
    features, _ = run(load_classifier(FOLDER / "classifier.safetensors"), images)
    wide = features.double()
    moments = {"mean": wide.mean(0), "covariance": torch.cov(wide.T)}
    save_file(moments, FOLDER / "test_moments.safetensors")


if __name__ == "__main__":
    main()
