"""`cibr data cache`: the pooled features X of frozen towers, computed once, so that heads train in seconds.

The file is what `features:FILE` reads (`cibr.data.features`), with every readable image and all of its captions.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cibr.data.batch import in_order
from cibr.data.dataset import Dataset, group_id
from cibr.data.features import save_strings
from cibr.data.options import DataOptions
from cibr.data.strings import Strings
from cibr.errors import UsageError, missing_extra


class Towers(Protocol):
    """The part of a model that a cache needs; `inputs` of what its towers give is X (n, width)."""

    def encode_image(self, images: Tensor) -> Any: ...
    def encode_text(self, tokens: Tensor) -> Any: ...
    def transform(self, train: bool) -> Callable[[Any], Tensor] | None: ...
    def tokenizer(self, texts: list[str]) -> Tensor: ...


@torch.no_grad()
def write_cache(
    towers: Towers,
    dataset: Dataset,
    options: DataOptions,
    out: Path,
    *,
    about: dict[str, str],
    device: str = "cpu",
    batch_size: int = 64,
) -> dict[str, int]:
    """Writes `out` whole or not at all; returns the numbers of images, captions and skipped samples.

    `about` (which model, which data) goes into the file's metadata. The towers are used as they are: put them into
    evaluation mode first. Raises UsageError if `out` is there, or if no image can be read.
    """
    try:
        from safetensors.torch import save_file
        from tqdm import tqdm
    except ImportError as error:
        raise missing_extra(error) from error
    if out.exists():
        raise UsageError(f"{out} is there already; remove it or choose another --out")
    if dataset.image_width is not None:
        raise UsageError(f"{options.data} holds features already")
    bar = tqdm(total=len(dataset), desc="images", unit="image", disable=None)
    images, index = [], []
    for batch in in_order(dataset, options, batch_size=batch_size, transform=towers.transform(False)):
        images.append(towers.encode_image(batch["image"].to(device)).inputs.float().cpu())
        index.append(batch["index"])
        bar.update(len(batch["index"]))
    bar.close()
    if not images:
        raise UsageError(f"no image of {options.data} can be read:\n{dataset.skipped}")
    rows = torch.cat(index)
    captions = [own_captions(dataset, row) for row in rows.tolist()]
    texts = encode_texts(towers, [text for own in captions for text in own], device, batch_size)
    tensors = describe(dataset, rows, captions)
    tensors |= {"image_features": torch.cat(images), "text_features": texts}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.partial-", dir=out.parent) as work:
        save_file(tensors, Path(work) / "features", {**about, "skipped": json.dumps(dict(dataset.skipped.counts))})
        os.chmod(Path(work) / "features", 0o644)
        os.replace(Path(work) / "features", out)
    return {"images": len(rows), "captions": len(texts), "skipped": dataset.skipped.total}


def own_captions(dataset: Dataset, row: int) -> tuple[str, ...]:
    """A row's captions; of a class's many templates the first, since they are no captions of this image."""
    own = dataset.texts[row]
    captions = own or dataset.captions(row)[:1]
    assert isinstance(captions, tuple)
    return captions


def encode_texts(towers: Towers, texts: Sequence[str], device: str, batch_size: int) -> Tensor:
    """(m, dt) float32; equal texts are encoded once."""
    from tqdm import tqdm

    distinct = list(dict.fromkeys(texts))
    place = {text: k for k, text in enumerate(distinct)}
    parts = []
    for first in tqdm(range(0, len(distinct), batch_size), desc="captions", unit="batch", disable=None):
        tokens = towers.tokenizer(distinct[first : first + batch_size]).to(device)
        parts.append(towers.encode_text(tokens).inputs.float().cpu())
    return torch.cat(parts)[[place[text] for text in texts]]


def describe(dataset: Dataset, rows: Tensor, captions: list[tuple[str, ...]]) -> dict[str, Tensor]:
    """What a features file says of its rows besides their features."""
    counts = torch.tensor([len(own) for own in captions])
    tensors = {"caption_starts": torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])}
    if dataset.labels is not None:
        tensors["labels"] = dataset.labels[rows].clone()
        tensors["group_ids"] = tensors["labels"].repeat_interleave(counts)
    else:
        tensors["group_ids"] = torch.tensor([group_id(text) for own in captions for text in own], dtype=torch.int64)
    save_strings(tensors, "keys", Strings(dataset.keys[row] for row in rows.tolist()))
    save_strings(tensors, "captions", Strings(text for own in captions for text in own))
    if dataset.class_names is not None:
        save_strings(tensors, "class_names", Strings(dataset.class_names))
    if dataset.styles is not None:
        save_strings(tensors, "styles", Strings(dataset.styles[row] for row in rows.tolist()))
    return tensors
