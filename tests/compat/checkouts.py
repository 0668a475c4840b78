"""Model files of public repositories, imported from checkouts in the directory `MOECA_THIRDPARTY`.

    MOECA_THIRDPARTY/DiT-MoE, DiffMoE, EfficientMoE, HunyuanImage-3.0
    models = load("DiffMoE", "models", "models_ECDiT")     # Absent without a checkout

The files import libraries that their models use little of. Where such a library is missing, a
stand-in of ours takes its place: timm's patch embedding, attention and MLP; for everything in
`UNUSED` an empty module, because the model at hand never calls it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from moeca_compile.debug.compat_suite import Absent

VARIABLE = "MOECA_THIRDPARTY"
UNUSED = ("fla", "fla.layers", "fla.layers.kda", "torchvision", "einops")


def commit(repository: str) -> str:
    """The commit of a checkout, from git or a file `.commit` in it; empty where there is none."""
    path = Path(os.environ.get(VARIABLE, "")) / repository
    noted = path / ".commit"
    if noted.is_file():
        return noted.read_text().strip()
    if not (path / ".git").exists():
        return ""
    asked = ("git", "-C", str(path), "rev-parse", "--short", "HEAD")
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def load(repository: str, folder: str, name: str) -> ModuleType:
    """The module `folder/name.py` of a checkout. Raises Absent where there is none."""
    root = os.environ.get(VARIABLE)
    if not root:
        raise Absent(f"{VARIABLE} names no directory with checkouts")
    path = Path(root) / repository / folder
    if not (path / f"{name}.py").is_file():
        raise Absent(f"{path.relative_to(root) / name}.py is not there")
    package = "thirdparty_" + "".join(c if c.isalnum() else "_" for c in f"{repository}_{folder}")
    if package not in sys.modules:
        holder = ModuleType(package)
        holder.__path__ = [str(path)]
        sys.modules[package] = holder
    with _stand_ins():
        return importlib.import_module(f"{package}.{name}")


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Stand-ins for libraries that are missing, for as long as a file is imported."""
    made: dict[str, ModuleType] = {}
    if importlib.util.find_spec("timm") is None:
        vision: Any = ModuleType("timm.models.vision_transformer")
        vision.PatchEmbed, vision.Attention, vision.Mlp = PatchEmbed, Attention, Mlp
        made = {name: ModuleType(name) for name in ("timm", "timm.models")}
        made["timm.models.vision_transformer"] = vision
    for name in UNUSED:
        if importlib.util.find_spec(name.split(".")[0]) is None:
            made[name] = _Anything(name)
    sys.modules.update(made)
    try:
        yield
    finally:  # others ask whether these libraries are there
        for name in made:
            del sys.modules[name]


class _Anything(ModuleType):
    """A module whose every public name is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class PatchEmbed(nn.Module):
    """Patches [B, C, H, W] -> [B, N, D], with the attributes the models read."""

    def __init__(self, size: int, patch: int, channels: int, dim: int, bias: bool = True) -> None:
        super().__init__()
        self.patch_size = (patch, patch)
        self.num_patches = (size // patch) ** 2
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention with one fused projection: [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, in_features: int, hidden_features: int, act_layer: Any, drop: float = 0):
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))
