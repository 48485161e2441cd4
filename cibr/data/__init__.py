"""Data sets of images and captions, and batches of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cibr.data.batch import Batch, Batches
from cibr.data.dataset import Dataset, Sample, Skipped, SkipSample
from cibr.data.options import KINDS, DataOptions
from cibr.data.pairs import Concept, ConceptSampler, Pairs, augment, load, split
from cibr.data.synthetic import open_synthetic
from cibr.data.transforms import training_transform
from cibr.errors import UsageError

__all__ = [
    "Batch",
    "Batches",
    "Concept",
    "ConceptSampler",
    "DataOptions",
    "Dataset",
    "Pairs",
    "Sample",
    "SkipSample",
    "Skipped",
    "augment",
    "load",
    "open_dataset",
    "split",
    "training_transform",
]

SOURCES: dict[str, Callable[[str, DataOptions], Dataset]] = {
    "synthetic": open_synthetic,
}


def open_dataset(options: DataOptions, split: str = "train") -> Dataset:
    """The data set that `options.data` names. Raises UsageError in words for what is not there or holds nothing."""
    kind, colon, place = options.data.partition(":")
    if not colon or kind not in KINDS:
        raise UsageError(_advice(options.data))
    dataset = SOURCES[kind](place, options)
    if not len(dataset):
        raise UsageError(f"no usable sample in {options.data}\n{dataset.skipped}".strip())
    return dataset


def _advice(data: str) -> str:
    """What to write instead of `data`, which has no kind."""
    endings = {".csv": "csv", ".tsv": "csv", ".safetensors": "features", ".tar": "webdataset"}
    kind = endings.get(Path(data).suffix)
    if kind is not None:
        return f"--data {data} does not say what it is; did you mean --data {kind}:{data}?"
    return f"--data {data} is none of the kinds there are: " + "; ".join(KINDS.values())
