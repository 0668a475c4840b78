"""What a model is recognised by: its tensors' names, dtypes and shapes, and a sample of values.

fingerprint(model)  ->  Fingerprint("DiTMoE", {"embed.weight": "float32[128, 16]", ...}, "9f3c...")
difference(saved, found)  ->  "embed.weight is float32[128, 16] in the file, bfloat16[128, 16] here"

A calibration holds for one set of weights. Hashing all of them would read the whole model at every
compilation; a few values of every tensor tell apart what training or another seed made.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SAMPLED = 16  # values of every tensor, evenly spaced
SHOWN = 3  # differences named in a message


@dataclass(frozen=True)
class Fingerprint:
    """tensors: name -> "dtype[shape]", parameters before buffers. weights: 16 hex digits."""

    model: str
    tensors: dict[str, str]
    weights: str


def fingerprint(model: nn.Module) -> Fingerprint:
    """Of every parameter and buffer, on any device. Reads SAMPLED values of each."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    digest = hashlib.sha256()
    for name, value in named.items():
        digest.update(f"{name} {_values(value)}".encode())
    tensors = {name: _describe(value) for name, value in named.items()}
    return Fingerprint(type(model).__name__, tensors, digest.hexdigest()[:16])


def difference(saved: Fingerprint, found: Fingerprint) -> str | None:
    """What tells `found` from the model in the file, in words; None for the same model."""
    only_saved = [n for n in saved.tensors if n not in found.tensors]
    only_found = [n for n in found.tensors if n not in saved.tensors]
    changed = [
        f"{name} is {kind} in the file, {found.tensors[name]} here"
        for name, kind in saved.tensors.items()
        if found.tensors.get(name, kind) != kind
    ]
    told = [f"{n} is missing here" for n in only_saved] + [f"{n} is new" for n in only_found]
    told = changed + told
    if told:
        more = f", and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
        return f"{'; '.join(told[:SHOWN])}{more}"
    if saved.weights != found.weights:
        return f"same tensors, other values (weights {saved.weights} and {found.weights})"
    return None


def _describe(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _values(value: Tensor) -> list[float]:
    """SAMPLED values at most, the same on every device; nothing of a tensor without storage."""
    if value.is_meta or not value.numel():
        return []
    count = min(SAMPLED, value.numel())
    places = [i * (value.numel() - 1) // max(count - 1, 1) for i in range(count)]
    with torch.no_grad():
        flat = value.detach().reshape(-1)[torch.tensor(places, device=value.device)].cpu()
        flat = torch.view_as_real(flat) if flat.is_complex() else flat
        return flat.double().flatten().tolist()
