"""The shortest use: one argument to torch.compile, then sample as before."""

from pathlib import Path

import torch
from fashion_ditmoe.model import load_model
from fashion_ditmoe.sampler import sample

import moeca_compile

model = load_model(Path(__file__).parent / "fashion_ditmoe")
compiled = torch.compile(model, backend="moeca")

images = sample(compiled, torch.arange(10), steps=50)  # [10, 1, 32, 32] in [-1, 1]

print(f"{len(images)} images, values from {images.min():.2f} to {images.max():.2f}")
print(moeca_compile.stats(compiled))
