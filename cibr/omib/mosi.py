"""CMU-MOSI as MMSA distributes it: one pickle of {train, valid, test} with arrays of text, audio and vision.

    FILE, or a folder with aligned_50.pkl or unaligned_50.pkl, there or in Processed/
    text (n, 50, 768)    audio (n, t, 5)    vision (n, t, 20)    regression_labels (n,), -3 to 3

A view is the mean over the times that are not padding.  Only arrays, texts and numbers are unpickled: a pickle that
asks for any other code is refused.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from cibr.errors import UsageError
from cibr.omib.data import Data, Split

NAMES = ("aligned_50.pkl", "unaligned_50.pkl")
VIEWS = ("text", "audio", "vision")
ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}


class ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return super().find_class(module, name)


def read(place: str) -> Data:
    """Raises UsageError for a file that is not there or has another layout."""
    path = find(Path(place))
    try:
        with path.open("rb") as file:
            content = load(file)
        parts = [split(content[name]) for name in ("train", "valid", "test")]
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError, ImportError) as error:
        raise UsageError(f"{path} is not MOSI as MMSA has it, of train, valid and test: {error}") from error
    return Data(parts[0], parts[1], parts[2])


def load(file: BinaryIO) -> Any:
    return ArraysOnly(file).load()


def find(place: Path) -> Path:
    places = [place] if place.suffix == ".pkl" else [f / name for f in (place, place / "Processed") for name in NAMES]
    for path in places:
        if path.is_file():
            return path
    raise UsageError(f"there is no {' or '.join(map(str, places))}: MMSA's page links to MOSI's features as pickles")


def split(part: dict[str, Any]) -> Split:
    """One split's arrays -> its views and targets.  Raises KeyError, TypeError and ValueError for another layout."""
    target = torch.from_numpy(np.asarray(part["regression_labels"], dtype=np.float32).ravel())
    views = []
    for name in VIEWS:
        values = np.asarray(part[name], dtype=np.float32)
        if values.ndim != 3 or len(values) != len(target):
            raise ValueError(f"{name} is {values.shape}, not ({len(target)}, times, width)")
        values = np.where(np.isfinite(values), values, 0)  # some sounds hold -inf
        there = (values != 0).any(2, keepdims=True)
        views.append(torch.from_numpy(values.sum(1) / np.maximum(there.sum(1), 1).astype(np.float32)))
    return Split(tuple(views), target)
