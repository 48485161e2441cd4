"""`cibr data check`: reads everything a data set holds once, and says what is there and what is not."""

from __future__ import annotations

import time

import torch
from PIL import Image
from torch import Tensor

from cibr.data import open_dataset
from cibr.data.batch import in_order
from cibr.data.options import DataOptions


def size(image: Image.Image) -> Tensor:
    """(2,) int64: width and height."""
    return torch.tensor(image.size)


def check(options: DataOptions, split: str = "train") -> str:
    """A report of the samples, captions, classes and groups, and of what was skipped and why.

    Raises UsageError for what `open_dataset` refuses.
    """
    began = time.perf_counter()
    dataset = open_dataset(options, split)
    listed = time.perf_counter()
    transform = size if dataset.image_width is None else None
    sizes = [
        batch["image"] for batch in in_order(dataset, options, batch_size=64, transform=transform) if "image" in batch
    ]
    read = time.perf_counter() - listed
    usable = len(dataset) if dataset.image_width is not None else sum(map(len, sizes))
    lines = [f"{usable} of {len(dataset)} samples listed can be read, {usable / max(read, 1e-9):.0f} a second"]
    lines.append(f"listed in {listed - began:.1f} s; fingerprint {dataset.fingerprint()[:16]}")
    if sizes:
        low, high = torch.cat(sizes).min(0).values.tolist(), torch.cat(sizes).max(0).values.tolist()
        lines.append(f"images of {low[0]} to {high[0]} by {low[1]} to {high[1]} pixels")
    if len(dataset.texts.strings):
        lines.append(f"{len(dataset.texts.strings)} captions, {len(set(dataset.texts.strings))} of them distinct")
    if dataset.class_names is not None and dataset.labels is not None:
        used = len(dataset.labels.unique())
        lines.append(f"{len(dataset.class_names)} classes, {used} of them with samples")
    lines.append(f"{len(dataset.group_ids.unique())} groups that are negatives of each other")
    lines.append(f"{dataset.skipped.total} skipped" + (f":\n{dataset.skipped}" if dataset.skipped.total else ""))
    return "\n".join(lines)
