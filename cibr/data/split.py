"""`--split-by`: a set divided at random into what is trained, validated and tested on, a function of `--split-seed`.

rows      train, val, test
classes   train, val, test   no class is in two of them; test are the unseen ones
          seen               other rows of the classes in train, where no style is held out
          held_out           the styles of `--hold-out`, of the classes in train, which has none of them
          unseen_held_out    those styles, of the classes in test
"""

from __future__ import annotations

import numpy as np

from cibr.data.dataset import Dataset
from cibr.data.few_shot import drawn
from cibr.data.options import DataOptions
from cibr.data.stream import Stream
from cibr.errors import UsageError

SPLITS = {
    "rows": ("train", "val", "test"),
    "classes": ("train", "val", "test", "seen", "held_out", "unseen_held_out"),
}


def divide(dataset: Dataset, options: DataOptions, split: str) -> Dataset:
    """The rows of one split.  Raises UsageError for a split that there is not, and one that is empty."""
    by = options.split_by
    assert by is not None
    if isinstance(dataset, Stream):
        raise UsageError(f"{options.data} is streamed, so it cannot be divided: --split-by needs local files")
    if split not in SPLITS[by]:
        raise UsageError(f"--split-by {by} has no split {split!r}; it has {', '.join(SPLITS[by])}")
    if options.classes != "all" or options.shot_seed:
        raise UsageError("--split-by draws classes and shots by --split-seed: leave --classes and --shot-seed out")
    if by == "rows":
        if options.hold_out is not None or options.shots is not None:
            raise UsageError("--hold-out and --shots belong to --split-by classes")
        chosen = np.flatnonzero(parts(len(dataset), options) == split)
    else:
        chosen = by_class(dataset, options, split)
    if not len(chosen):
        raise UsageError(f"the split {split} of {options.data} has no row; it has {len(dataset)} in all")
    return dataset.take(chosen)


def parts(n: int, options: DataOptions) -> np.ndarray:
    """(n,) names of where each of n rows or classes goes."""
    order = np.random.default_rng((options.split_seed, n)).permutation(n)
    test, val = round(options.test_share * n), round(options.val_share * n)
    names = np.full(n, "train", dtype="<U5")
    names[order[:test]] = "test"
    names[order[test : test + val]] = "val"
    return names


def by_class(dataset: Dataset, options: DataOptions, split: str) -> np.ndarray:
    """(m,) rows."""
    if dataset.labels is None or dataset.class_names is None:
        raise UsageError(f"{options.data} has no classes: --split-by rows divides it")
    labels = dataset.labels.numpy()
    of = parts(len(dataset.class_names), options)[labels]
    held = held_styles(dataset, options.hold_out)
    kept_back = np.zeros(len(labels), bool) if held.any() else of_each_class(labels, options)
    if split in ("held_out", "unseen_held_out"):
        if not held.any():
            raise UsageError(f"the split {split} is of a style: --hold-out names it")
        return np.flatnonzero(held & (of == ("train" if split == "held_out" else "test")))
    if split == "seen":
        return np.flatnonzero(kept_back & (of == "train"))
    rows = np.flatnonzero(~held & (of == split) & ~(kept_back & (split == "train")))
    return drawn(rows, labels[rows], options.shots, options.split_seed) if split == "train" and options.shots else rows


def held_styles(dataset: Dataset, names: str | None) -> np.ndarray:
    """(n,) bool: the rows in a style that `names`, with commas between, has, or in one of its family: `noto` is that
    of `noto-v1`.  Raises UsageError for a name that is none's.
    """
    held = np.zeros(len(dataset), bool)
    if names is None:
        return held
    if dataset.styles is None:
        raise UsageError("--hold-out names a style, and these data have none")
    styles = np.array(dataset.styles)
    for name in names.split(","):
        found = [style for style in set(dataset.styles) if style == name or style.startswith(f"{name}-")]
        if not found:
            known = ", ".join(sorted(set(dataset.styles)))
            raise UsageError(f"--hold-out {name!r} is no style here; known are {known}")
        held |= np.isin(styles, found)
    if held.all():
        raise UsageError(f"--hold-out {names} leaves no style to train on")
    return held


def of_each_class(labels: np.ndarray, options: DataOptions) -> np.ndarray:
    """(n,) bool: the share `test_share` of each class's rows, rounded down."""
    place, count = place_in_class(labels, options)
    return place < np.floor(options.test_share * count)


def place_in_class(labels: np.ndarray, options: DataOptions) -> tuple[np.ndarray, np.ndarray]:
    """(n,) where each row stands in a random order of its class, from 0, and (n,) how many the class has."""
    shuffled = np.random.default_rng((options.split_seed, 1)).permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    count = np.bincount(labels)
    place = np.empty(len(labels), np.int64)
    place[order] = np.arange(len(labels)) - (np.cumsum(count) - count)[labels[order]]
    return place, count[labels]
