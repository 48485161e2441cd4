"""What a worker process makes: the batch of a step, or the images of a range of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as Items

from cibr.data.dataset import Dataset, SkipSample, group_id
from cibr.data.features import FeatureSet
from cibr.data.order import Order, random_numbers
from cibr.data.transforms import Tokenizer, Transform, own_random_state


@dataclass
class Made:
    """A batch, what could not be read for it (name, reason), or why there is no batch."""

    batch: dict[str, Tensor]
    bad: list[tuple[str, str]]
    error: str | None = None

    def pin_memory(self) -> Made:
        """What a DataLoader calls where there is a GPU; it would leave an object that it does not know as it is."""
        return Made({key: value.pin_memory() for key, value in self.batch.items()}, self.bad, self.error)


class NothingReadable(Exception):
    """The message says so, with an example."""


class Steps(Items[Made]):
    """Item `step` is the part of that step's batch that this rank takes."""

    def __init__(
        self, dataset: Dataset, order: Order, part: slice, transform: Transform | None, tokenizer: Tokenizer | None
    ) -> None:
        self.dataset, self.order, self.part = dataset, order, part
        self.transform, self.tokenizer = transform, tokenizer
        self.bad: dict[int, str] = {}  # this process's memory of rows that cannot be read

    def __getitem__(self, step: int) -> Made:
        rows = self.order.rows(step)[self.part]
        if isinstance(self.dataset, FeatureSet):
            return Made(self.dataset.batch(rows, random_numbers(self.order.seed, step, rows)), [])
        known = len(self.bad)
        try:
            batch, error = self._read(step, rows), None
        except NothingReadable as nothing:
            batch, error = {}, str(nothing)
        bad = [(name_of(self.dataset, row), reason) for row, reason in list(self.bad.items())[known:]]
        return Made(batch, bad, error)

    def _read(self, step: int, rows: np.ndarray) -> dict[str, Tensor]:
        images: list[Tensor] = []
        captions: list[Any] = []
        taken: list[int] = []
        numbers = random_numbers(self.order.seed, step, rows).tolist()
        with own_random_state() as seed:
            for place, (first, number) in enumerate(zip(rows.tolist(), numbers, strict=True)):
                row, image = self._readable(step, place, first)
                captions.append(self.dataset.draw(row, number))
                seed(number)
                images.append(self.transform(image) if self.transform is not None else image)
                taken.append(row)
        batch = {"image": torch.stack(images), "index": torch.tensor(taken)}
        batch["group_ids"] = groups(self.dataset, taken, captions)
        if self.tokenizer is not None:
            batch["text"] = self.tokenizer(captions)
        return batch

    def _readable(self, step: int, place: int, row: int) -> tuple[int, Any]:
        """The row and its image; for one that cannot be read, what takes its place further on in the order."""
        for attempt in range(1, self.order.attempts + 1):
            if row not in self.bad:
                try:
                    return row, self.dataset.image(row)
                except SkipSample as reason:
                    self.bad[row] = str(reason)
            last, row = row, int(self.order.rows(step, attempt)[self.part][place])
        raise NothingReadable(
            f"{self.order.attempts} samples in a row cannot be read, the last, {name_of(self.dataset, last)}: "
            f"{self.bad[last]}"
        )


class Rows(Items[Made]):
    """Item `range(a, b)` is the images of these rows."""

    def __init__(self, dataset: Dataset, transform: Transform | None) -> None:
        self.dataset, self.transform = dataset, transform

    def __getitem__(self, rows: range) -> Made:
        images: list[Tensor] = []
        taken: list[int] = []
        bad = []
        for row in rows:
            try:
                image: Any = self.dataset.image(row)
            except SkipSample as reason:
                bad.append((name_of(self.dataset, row), str(reason)))
                continue
            images.append(self.transform(image) if self.transform is not None else image)
            taken.append(row)
        key = "image" if self.dataset.image_width is None else "image_features"
        return Made({key: torch.stack(images), "index": torch.tensor(taken)} if taken else {}, bad)


def groups(dataset: Dataset, rows: list[int], captions: list[str]) -> Tensor:
    """(n,) int64: the class of each pair, or what is equal for equal captions."""
    if dataset.labels is not None:
        return dataset.labels[rows]
    return torch.tensor([group_id(text) for text in captions], dtype=torch.int64)


def name_of(dataset: Dataset, row: int) -> str:
    return f"{dataset.keys[row]}, row {row}"
