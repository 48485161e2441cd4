"""A few samples of each class to train on, and one half of the classes, as CoOp chooses them.

    shots     K rows of each class of the split `train`, drawn by a seed; a class with fewer keeps all
    classes   base: the first half of the classes in their order, rounded up; new: the rest; numbered from 0 again

A set without a split would be tested on what it was trained on: half of each class, by a hash of the rows' names, is
for training and half for tests.  More shots of one seed hold the fewer ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from cibr.data.dataset import Dataset, Subset
from cibr.data.features import FeatureSet
from cibr.data.options import DataOptions
from cibr.data.stream import Stream
from cibr.errors import UsageError


class Chosen(Subset):
    """The `rows` of another data set, and its `classes`, all of which stay: a split may have no image of one."""

    def __init__(self, whole: Dataset, rows: np.ndarray, classes: range) -> None:
        assert whole.labels is not None and whole.class_names is not None
        super().__init__(whole, rows)
        self.labels = whole.labels[rows] - classes.start
        self.class_names = [whole.class_names[c] for c in classes]
        self.distinct_groups = False  # an epoch is all shots


def choose(dataset: Dataset, options: DataOptions, split: str, open_split: Callable[[str], Dataset]) -> Dataset:
    """The part of a split that `options` choose, or `dataset` itself where they choose nothing.

    `open_split` opens another split of the same set.  Raises UsageError for data without classes, and where no row is
    left.
    """
    if split == "all" or (options.shots is None and options.classes == "all"):
        return dataset
    if isinstance(dataset, Stream | FeatureSet) or dataset.labels is None or dataset.class_names is None:
        raise UsageError(f"--shots and --classes choose among images with classes, which {options.data} does not hold")
    labels, count = dataset.labels.numpy(), len(dataset.class_names)
    half = (count + 1) // 2
    classes = {"all": range(count), "base": range(half), "new": range(half, count)}[options.classes]
    chosen = np.isin(labels, np.array(classes))
    if same_rows(dataset, open_split("test" if split == "train" else "train")):
        chosen &= first_halves(dataset.keys, labels) == (split == "train")
    rows = np.flatnonzero(chosen)
    if split == "train" and options.shots is not None:
        rows = drawn(rows, labels[rows], options.shots, options.shot_seed)
    if not len(rows):
        raise UsageError(
            f"no image of {options.data} is left: it has {count} classes, of which --classes new takes half"
        )
    return Chosen(dataset, rows, classes)


def same_rows(one: Dataset, other: Dataset) -> bool:
    """Whether two splits are the same rows of the same files, which says that the set has none."""
    places = [getattr(split, "folder", None) or getattr(split, "tars", None) for split in (one, other)]
    return len(one) == len(other) and places[0] == places[1] and one.fingerprint() == other.fingerprint()


def first_halves(keys: Any, labels: np.ndarray) -> np.ndarray:
    """(n,) bool: of each class the half of its rows, rounded up, whose names' SHA-256 are the least."""
    digests = [hashlib.sha256(keys[row].encode()).digest() for row in range(len(labels))]
    first = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = sorted(np.flatnonzero(labels == label).tolist(), key=digests.__getitem__)
        first[rows[: (len(rows) + 1) // 2]] = True
    return first


def drawn(rows: np.ndarray, labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """`shots` of the rows of each label, or all there are, in ascending order; each label's draw is its own."""
    parts = []
    for label in np.unique(labels):
        own = rows[labels == label]
        parts.append(np.random.default_rng((seed, int(label))).permutation(own)[:shots])
    return np.sort(np.concatenate(parts)) if parts else rows
