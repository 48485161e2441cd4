"""Cached features of frozen towers: one safetensors file, mapped into memory, with one or several captions an image.

image_features   (n, dv) float32
text_features    (m, dt) float32, of all captions, those of an image in a row
caption_starts   (n + 1,) int64: image i has the captions from caption_starts[i] to caption_starts[i + 1]
group_ids        (m,) int64, equal for equal captions or classes
labels           (n,) int64, where there are classes
*.bytes, *.starts  the strings of `keys`, `captions`, `class_names` and `styles`
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cibr.data.dataset import Dataset, classes_left
from cibr.data.options import DataOptions
from cibr.data.strings import Strings, Texts
from cibr.errors import UsageError, missing_extra
from cibr.needs import MOST_CAPTIONS


class FeatureSet(Dataset):
    """Rows of a features file; a batch is gathered at once."""

    def __init__(self, tensors: dict[str, Tensor], limit: int | None = None) -> None:
        """Raises KeyError or ValueError for tensors that do not belong together."""
        self.image_features, self.text_features = tensors["image_features"], tensors["text_features"]
        self.starts, self.caption_groups = tensors["caption_starts"], tensors["group_ids"]
        n, m = len(self.image_features), len(self.text_features)
        if self.starts[0] != 0 or self.starts[-1] != m or len(self.starts) != n + 1 or (self.starts.diff() < 1).any():
            raise ValueError("caption_starts does not divide the captions among the images")
        if len(self.caption_groups) != m:
            raise ValueError(f"{len(self.caption_groups)} group_ids for {m} captions")
        n = min(n, limit or n)
        captions = load_strings(tensors, "captions")
        super().__init__((), ())
        self.keys = load_strings(tensors, "keys") or Strings(str(row) for row in range(n))
        self.texts = Texts.of_strings(captions, self.starts.numpy()) if captions is not None else self.texts
        names, styles = load_strings(tensors, "class_names"), load_strings(tensors, "styles")
        self.class_names = None if names is None else list(names)
        self.styles = None if styles is None else list(styles)
        self.labels = tensors["labels"][:n] if "labels" in tensors else None
        self.rows = n
        self.distinct_groups = self.styles is not None  # two drawings of one concept are no negatives of each other
        self.image_width, self.text_width = self.image_features.shape[1], self.text_features.shape[1]

    def __len__(self) -> int:
        return self.rows

    def image(self, index: int) -> Tensor:
        return self.image_features[index]

    def captions(self, index: int) -> Tensor:
        return self.text_features[self.starts[index] : self.starts[index + 1]]

    @property
    def group_ids(self) -> Tensor:
        return self.caption_groups[self.starts[: self.rows]]

    def one_group(self) -> bool:
        return bool((self.caption_groups == self.caption_groups[0]).all())

    def batch(self, rows: np.ndarray, numbers: np.ndarray) -> dict[str, Tensor]:
        """The batch of `rows` (n,), of each a caption by its random number."""
        starts = self.starts.numpy()  # which indexes a few hundred numbers faster than torch does
        first = starts[rows]
        caption = torch.from_numpy(first + numbers % (starts[rows + 1] - first))
        index = torch.from_numpy(rows)
        return {
            "image_features": self.image_features.index_select(0, index),  # five times as fast as indexing
            "text_features": self.text_features.index_select(0, caption),
            "group_ids": self.caption_groups.index_select(0, caption),
            "index": index,
        }

    def take(self, rows: np.ndarray) -> FeatureSet:
        """The features and captions of these `rows` (m,) int64, in their order."""
        chosen = torch.from_numpy(rows)
        first, count = self.starts[chosen], self.starts[chosen + 1] - self.starts[chosen]
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)])
        captions = torch.arange(int(starts[-1])) + (first - starts[:-1]).repeat_interleave(count)
        tensors = {"image_features": self.image_features[chosen], "text_features": self.text_features[captions]}
        tensors |= {"caption_starts": starts, "group_ids": self.caption_groups[captions]}
        labels, names = classes_left(self, rows)
        if labels is not None:
            tensors["labels"] = labels
        strings: dict[str, Iterable[str] | None] = {
            "keys": (self.keys[row] for row in rows.tolist()),
            "captions": (text for row in rows.tolist() for text in self.texts[row]) if len(self.texts) else None,
            "class_names": names,
            "styles": None if self.styles is None else (self.styles[row] for row in rows.tolist()),
        }
        for name, several in strings.items():
            if several is not None:
                save_strings(tensors, name, Strings(several))
        return FeatureSet(tensors)

    def every_caption(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """All captions of `rows` (n,), MOST_CAPTIONS at most: (n, k, dt), 0 where there are fewer, and how many."""
        first, end = (self.starts[torch.from_numpy(rows) + one] for one in (0, 1))
        count = (end - first).clamp(max=MOST_CAPTIONS)
        place = torch.arange(int(count.max()))
        there = place < count[:, None]
        texts = self.text_features[(first[:, None] + place).clamp(max=len(self.text_features) - 1)]
        return texts * there[:, :, None], count

    def sizes(self) -> np.ndarray:
        """The sums of the features, so that those of another tower are another set."""
        sums = torch.stack([self.image_features[: self.rows].double().sum(), self.text_features.double().sum()])
        return sums.view(torch.int64).numpy()


def save_strings(tensors: dict[str, Tensor], name: str, strings: Strings) -> None:
    tensors[f"{name}.bytes"] = torch.from_numpy(strings.bytes.copy())
    tensors[f"{name}.starts"] = torch.from_numpy(strings.starts)


def load_strings(tensors: dict[str, Tensor], name: str) -> Strings | None:
    if f"{name}.bytes" not in tensors:
        return None
    return Strings.of_arrays(tensors[f"{name}.bytes"].numpy(), tensors[f"{name}.starts"].numpy())


def open_features(place: str, options: DataOptions, split: str) -> FeatureSet:
    """Raises UsageError for a file that is not there, or none of `cibr data cache`'s."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise missing_extra(error) from error
    if not Path(place).is_file():
        raise UsageError(f"there is no file {place}; `cibr data cache` writes one")
    try:
        with safe_open(place, "pt") as file:  # tensors on the CPU are mapped, not read
            tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return FeatureSet(tensors, options.limit)
    except (SafetensorError, KeyError, ValueError) as error:
        raise UsageError(f"{place} is not what `cibr data cache` writes: {error}") from error
