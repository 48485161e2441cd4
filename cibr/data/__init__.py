"""Data sets of images and captions, and batches of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cibr.data.batch import Batch, Batches, in_order
from cibr.data.csv import open_csv
from cibr.data.dataset import Dataset, Sample, Skipped, SkipSample
from cibr.data.emoji import open_emoji
from cibr.data.features import open_features
from cibr.data.few_shot import choose
from cibr.data.folder import open_folder
from cibr.data.hf import open_hf
from cibr.data.karpathy import open_karpathy
from cibr.data.options import DataOptions
from cibr.data.split import divide
from cibr.data.standard import STANDARD, open_standard
from cibr.data.stream import Stream
from cibr.data.synthetic import open_synthetic
from cibr.data.transforms import training_transform
from cibr.data.webdataset import open_webdataset
from cibr.errors import UsageError

__all__ = [
    "Batch",
    "Batches",
    "DataOptions",
    "Dataset",
    "Sample",
    "SkipSample",
    "Skipped",
    "Source",
    "in_order",
    "kind_of",
    "open_dataset",
    "training_transform",
]

Opener = Callable[[str, DataOptions, str], Dataset]  # what follows the colon, the options, the split


@dataclass(frozen=True)
class Source:
    """A kind of data set: `open` raises UsageError in words; `grammar` says what follows the kind's name."""

    open: Opener
    grammar: str


SOURCES: dict[str, Source] = {
    "emoji": Source(open_emoji, "DIR, as `cibr data emoji` builds it"),
    "webdataset": Source(open_webdataset, "DIR, a glob of local .tar files, urls with braces, or pipe:COMMAND"),
    "csv": Source(open_csv, "FILE, a row for each pair of image path and caption"),
    "folder": Source(open_folder, "DIR, a folder of images for each class"),
    "hf": Source(open_hf, "NAME_OR_PATH of a Hugging Face data set"),
    "features": Source(open_features, "FILE, as `cibr data cache` writes it"),
    "synthetic": Source(open_synthetic, "N drawings made on the fly"),
    "karpathy": Source(open_karpathy, "FILE.json of Karpathy's splits of COCO, Flickr30K or Flickr8K, by the images"),
    **{kind: Source(partial(open_standard, kind), "DIR, as its authors publish it") for kind in STANDARD},
}


def open_dataset(options: DataOptions, split: str = "train") -> Dataset:
    """The data set that `options.data` names; a plain folder of tars is one of emoji or of webdataset's layout.

    Raises UsageError in words for what is not there or holds nothing.
    """
    kind, place = kind_of(options.data)
    if kind not in SOURCES or not place:
        raise UsageError(_advice(options.data))
    if options.split_by is not None:
        whole = dataclasses.replace(options, hold_out=None, split_by=None)
        return divide(SOURCES[kind].open(place, whole, "all" if kind == "emoji" else "train"), options, split)
    dataset = SOURCES[kind].open(place, options, split)
    if not isinstance(dataset, Stream) and not len(dataset):
        raise UsageError(f"no usable sample in {options.data}\n{dataset.skipped}".strip())
    return choose(dataset, options, split, partial(SOURCES[kind].open, place, options))


def kind_of(data: str) -> tuple[str, str]:
    """`csv:FILE` -> csv, FILE; a plain folder of tars is of a kind, too."""
    kind, colon, place = data.partition(":")
    if not colon and Path(kind).is_dir() and any(Path(kind).glob("*.tar")):
        return "emoji" if (Path(kind) / "set.json").is_file() else "webdataset", kind
    return kind, place


def _advice(data: str) -> str:
    """What to write instead of `data`, which has no kind."""
    endings = {".csv": "csv", ".tsv": "csv", ".safetensors": "features", ".tar": "webdataset"}
    kind = endings.get(Path(data).suffix)
    if kind is not None and ":" not in data:
        return f"--data {data} does not say what it is; did you mean --data {kind}:{data}?"
    known = "\n".join(f"  {name}:{source.grammar}" for name, source in SOURCES.items())
    missing = "" if ":" in data or Path(data).exists() else f"; nor is there a folder {data}"
    return f"--data {data} is none of the kinds there are{missing}. Known are\n{known}"
