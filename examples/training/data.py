"""Fashion-MNIST as a tensor: 28x28 bytes, padded to 32x32, scaled to [-1, 1].

apt-get install dataset-fashion-mnist      (MIT licence, 30 MB)
train-images-idx3-ubyte.gz  ->  images [60000, 1, 32, 32] float32, labels [60000] int64
"""

import gzip
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

DATA_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_PAD = 2  # 28 + 2 * 2 = 32


def load_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 32, 32] in [-1, 1] and labels [N] of `split`, "train" or "t10k".

    Raises FileNotFoundError when the data set is not in `folder`.
    """
    images = _read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = _read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    pixels = torch.from_numpy(images).float().div(127.5).sub(1.0).unsqueeze(1)
    return F.pad(pixels, (_PAD,) * 4, value=-1.0), torch.from_numpy(labels).long()


def _read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: two zeros, type 8, rank, big-endian sizes, then the values."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; install the Debian package dataset-fashion-mnist or name the "
            "folder that holds the four .gz files with --data"
        )
    raw = gzip.decompress(path.read_bytes())
    rank = raw[3]
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()
