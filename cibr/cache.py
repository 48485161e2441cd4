"""`cibr data cache`: the pooled features X of frozen towers, computed once, so that heads train in seconds.

The file is what `features:FILE` reads (`cibr.data.features`): every image that can be read, with all of its captions.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from cibr import models
from cibr.data import DataOptions, Dataset, open_dataset
from cibr.data.corruptions import Corrupted
from cibr.data.dataset import group_id
from cibr.data.features import save_strings
from cibr.data.strings import Strings
from cibr.errors import UsageError, missing_extra
from cibr.evaluate.encode import encode_images, encode_texts
from cibr.models import Model
from cibr.models.packaged import Packaged
from cibr.run import checkpoint


def towers(spec: str) -> Model:
    """The frozen towers that `spec` names, in evaluation mode: `packaged`, open_clip:..., or the folder of a run.

    Raises UsageError for towers without trained weights.
    """
    if spec == "packaged":
        return Packaged()
    if Path(spec).is_dir():
        return checkpoint.load_run(Path(spec)).model.eval()
    if not spec.startswith("open_clip:"):
        raise UsageError(
            f"--model {spec} has no trained weights; known are packaged, open_clip:NAME/TAG_OR_FILE, a run"
        )
    return models.build(models.options_type(spec)(model=spec)).eval()


@torch.no_grad()
def write_cache(
    spec: str, model: Model, options: DataOptions, out: Path, split: str = "train", *, corrupted: bool = False
) -> dict[str, int]:
    """Writes `out` whole or not at all; returns the numbers of images, captions and skipped samples.

    `corrupted`: the images are damaged first, as `cibr.data.corruptions` says.

    Raises UsageError if `out` is there, for data that is no images, and if none can be read.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise missing_extra(error) from error
    if out.exists():
        raise UsageError(f"{out} is there already; remove it or choose another --out")
    dataset = open_dataset(options, split)
    if corrupted:
        dataset = Corrupted(dataset)
    images = encode_images(model, dataset, options)
    captions = [own_captions(dataset, row) for row in images.rows.tolist()]
    tensors = describe(dataset, images.rows, captions)
    tensors["image_features"] = images.features.inputs.contiguous()
    tensors["text_features"] = encode_distinct(model, [text for own in captions for text in own])
    about = {"model": spec, "data": options.data, "fingerprint": dataset.fingerprint()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.partial-", dir=out.parent) as work:
        save_file(tensors, Path(work) / "features", {**about, "skipped": json.dumps(dict(dataset.skipped.counts))})
        os.chmod(Path(work) / "features", 0o644)  # safetensors makes it private
        os.replace(Path(work) / "features", out)
    counts = {"images": len(images.rows), "captions": len(tensors["text_features"])}
    return {**counts, "skipped": dataset.skipped.total}


def own_captions(dataset: Dataset, row: int) -> tuple[str, ...]:
    """A row's captions; of a class's many templates the first, since they are no captions of this image."""
    captions = dataset.captions(row)
    assert isinstance(captions, tuple)
    return captions if dataset.texts[row] else captions[:1]


def encode_distinct(model: Model, texts: list[str]) -> Tensor:
    """(m, dt) float32; equal texts are encoded once."""
    place = {text: k for k, text in enumerate(dict.fromkeys(texts))}
    return encode_texts(model, list(place)).inputs[[place[text] for text in texts]]


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
