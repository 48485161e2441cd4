"""What a worker process makes: the batch of a step, or the images of a range of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as Items

from cibr.data.dataset import Dataset, SkipSample, group_id
from cibr.data.features import FeatureSet
from cibr.data.order import Order, Partners, random_numbers
from cibr.data.transforms import Tokenizer, Transform, own_random_state
from cibr.needs import ALL, MOST_CAPTIONS, SECOND, Needs


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
        self,
        dataset: Dataset,
        order: Order,
        part: slice,
        transform: Transform | None,
        tokenizer: Tokenizer | None,
        needs: Needs = Needs(),
    ) -> None:
        self.dataset, self.order, self.part, self.needs = dataset, order, part, needs
        self.transform, self.tokenizer = transform, tokenizer
        self.partners = Partners(None if dataset.labels is None or not needs.second else dataset.labels.numpy())
        self.bad: dict[int, str] = {}  # this process's memory of rows that cannot be read

    def __getitem__(self, step: int) -> Made:
        rows = self.order.rows(step)[self.part]
        if isinstance(self.dataset, FeatureSet):
            return Made(self._gather(self.dataset, step, rows), [])
        known = len(self.bad)
        try:
            batch, error = self._read(step, rows), None
        except NothingReadable as nothing:
            batch, error = {}, str(nothing)
        bad = [(name_of(self.dataset, row), reason) for row, reason in list(self.bad.items())[known:]]
        return Made(batch, bad, error)

    def _gather(self, features: FeatureSet, step: int, rows: np.ndarray) -> dict[str, Tensor]:
        batch = features.batch(rows, random_numbers(self.order.seed, step, rows))
        if self.needs.second:
            numbers = self._second_numbers(step, rows)
            second = features.batch(self.partners.of(rows, numbers), random_numbers(self.order.seed, step, rows, 2))
            batch |= {key + SECOND: second[key] for key in ("image_features", "text_features", "group_ids")}
        if self.needs.captions:
            batch["text_features" + ALL], batch["caption_count"] = features.every_caption(rows)
        return batch

    def _second_numbers(self, step: int, rows: np.ndarray) -> np.ndarray:
        """By which a row's partner is chosen."""
        return random_numbers(self.order.seed, step, rows, 1)

    def _read(self, step: int, rows: np.ndarray) -> dict[str, Tensor]:
        taken: list[int] = []
        first, second = _Side(self.dataset, self.transform), _Side(self.dataset, self.transform)
        numbers, more = (random_numbers(self.order.seed, step, rows, *k).tolist() for k in ((), (2,)))
        with own_random_state() as seed:
            for place, wanted in enumerate(rows.tolist()):
                row, image = self._readable(step, place, wanted)
                taken.append(row)
                first.add(row, image, numbers[place], seed)
                if self.needs.second:
                    one = np.array([row])
                    partner = int(self.partners.of(one, self._second_numbers(step, one))[0])
                    second.add(partner, self._image_or(partner, image), more[place], seed)
        batch = first.batch(self.tokenizer)
        if self.needs.second:
            batch |= {key + SECOND: value for key, value in second.batch(self.tokenizer).items()}
        batch["index"] = torch.tensor(taken)
        if self.needs.captions and self.tokenizer is not None:
            batch |= self._all_captions(taken)
        return batch

    def _image_or(self, row: int, other: Any) -> Any:
        """The row's image, or the `other` one where it cannot be read."""
        if row not in self.bad:
            try:
                return self.dataset.image(row)
            except SkipSample as reason:
                self.bad[row] = str(reason)
        return other

    def _all_captions(self, rows: list[int]) -> dict[str, Tensor]:
        assert self.tokenizer is not None
        captions = [self.dataset.captions(row)[:MOST_CAPTIONS] for row in rows]
        count = torch.tensor([len(own) for own in captions])
        texts = self.tokenizer([str(text) for own in captions for text in own])
        padded = texts.new_zeros(len(rows), int(count.max()), texts.shape[1])
        padded[torch.arange(padded.shape[1]) < count[:, None]] = texts
        return {"text" + ALL: padded, "caption_count": count}

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


class _Side:
    """An image and a caption of each row, collected row by row: of a decoded photograph only the transform is kept."""

    def __init__(self, dataset: Dataset, transform: Transform | None) -> None:
        self.dataset, self.transform = dataset, transform
        self.rows: list[int] = []
        self.images: list[Tensor] = []
        self.captions: list[Any] = []

    def add(self, row: int, image: Any, number: int, seed: Callable[[int], None]) -> None:
        self.rows.append(row)
        self.captions.append(self.dataset.draw(row, number))
        seed(number)
        self.images.append(self.transform(image) if self.transform is not None else image)

    def batch(self, tokenizer: Tokenizer | None) -> dict[str, Tensor]:
        batch = {"image": torch.stack(self.images), "group_ids": groups(self.dataset, self.rows, self.captions)}
        return batch if tokenizer is None else {**batch, "text": tokenizer(self.captions)}


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
