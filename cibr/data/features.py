"""Cached features of frozen towers: a safetensors file, mapped into memory, with one or several captions an image.

image_features   (n, dv) float32 or less
text_features    (m, dt), of all captions, those of an image in a row
caption_starts   (n + 1,) int64: the captions of image i are [caption_starts[i], caption_starts[i + 1])
group_ids        (m,) int64, equal for equal captions or classes
keys, captions   bytes and starts of strings; labels (n,) int64 where there are classes
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cibr.data.dataset import Dataset
from cibr.data.options import DataOptions


class Features(Dataset):
    """Rows of a features file."""

    def batch(self, rows: np.ndarray, numbers: np.ndarray) -> dict[str, Tensor]:
        """The batch of `rows` (n,), a caption each by a random number."""
        raise NotImplementedError


def open_features(path: Path, options: DataOptions) -> Features:
    raise NotImplementedError


_ = torch
