"""Batches, made by worker processes; each a function of seed and step, whatever the number of workers and ranks.

A batch is a dictionary:

    image            (n, 3, size, size) float32, through the transform; or image_features (n, dv) float32
    text             (n, length) int64, through the tokenizer; or text_features (n, dt) float32
    group_ids        (n,) int64, equal for pairs that are no negatives of each other; absent without `mask_duplicates`
    index            (n,) int64, rows of the data set
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cibr.data.dataset import Dataset, Skipped, SkipSample, group_id
from cibr.data.features import FeatureSet
from cibr.data.options import DataOptions
from cibr.data.order import Order, random_numbers
from cibr.data.transforms import Transform, own_random_state
from cibr.errors import UsageError

Batch = dict[str, Tensor]
Tokenizer = Callable[[list[str]], Tensor]


@dataclass
class Made:
    """What a worker hands back: a batch, the rows it could not read, or why there is no batch."""

    batch: Batch
    bad: list[tuple[int, str]]  # row, reason
    error: str | None = None


class Steps(torch.utils.data.Dataset[Made]):
    """Item `step` is the part of that step's batch that this rank takes."""

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        part: slice,
        transform: Transform | None,
        tokenizer: Tokenizer | None,
        mask_duplicates: bool,
    ) -> None:
        self.dataset, self.order, self.part = dataset, order, part
        self.transform, self.tokenizer, self.mask_duplicates = transform, tokenizer, mask_duplicates
        self.bad: dict[int, str] = {}  # this process's memory of rows that cannot be read

    def __getitem__(self, step: int) -> Made:
        rows = self.order.rows(step)[self.part]
        if isinstance(self.dataset, FeatureSet):
            batch = self.dataset.batch(rows, random_numbers(self.order.seed, step, rows))
            return Made(self._without_groups(batch), [])
        before = set(self.bad)
        try:
            batch = self._read(step, rows)
        except _NothingReadable as error:
            return Made({}, list(self.bad.items()), str(error))
        return Made(self._without_groups(batch), [(row, why) for row, why in self.bad.items() if row not in before])

    def _read(self, step: int, rows: np.ndarray) -> Batch:
        images: list[Tensor] = []
        captions: list[Any] = []
        taken: list[int] = []
        with own_random_state() as seed:
            for place, row in enumerate(rows.tolist()):
                row, image = self._readable(step, place, row)
                number = int(random_numbers(self.order.seed, step, np.array([row]))[0])
                captions.append(self.dataset.draw(row, number))
                seed(number)
                images.append(self.transform(image) if self.transform is not None else image)
                taken.append(row)
        batch = {"index": torch.tensor(taken), "image": torch.stack(images)}
        batch["group_ids"] = batch_groups(self.dataset, taken, captions)
        if self.tokenizer is not None:
            batch["text"] = self.tokenizer(captions)
        return batch

    def _readable(self, step: int, place: int, row: int) -> tuple[int, Any]:
        """The row and its image; for one that cannot be read, what takes its place in the order."""
        for attempt in range(1, self.order.attempts + 1):
            if row not in self.bad:
                try:
                    return row, self.dataset.image(row)
                except SkipSample as reason:
                    self.bad[row] = str(reason)
            row = int(self.order.rows(step, attempt)[self.part][place])
        raise _NothingReadable(f"none of the samples drawn can be read; {self.dataset.keys[row]}: {self.bad[row]}")

    def _without_groups(self, batch: Batch) -> Batch:
        if not self.mask_duplicates:
            del batch["group_ids"]
        return batch


class _NothingReadable(Exception):
    pass


def batch_groups(dataset: Dataset, rows: list[int], captions: list[Any]) -> Tensor:
    """(n,) int64: the class of each pair, or what is equal for equal captions."""
    if dataset.labels is not None:
        return dataset.labels[rows]
    return torch.tensor([group_id(text) for text in captions], dtype=torch.int64)


class Batches:
    """The batches of a run. `skipped` counts each sample that could not be read once, with the first one's name."""

    def __init__(
        self,
        dataset: Dataset,
        options: DataOptions,
        *,
        batch_size: int,
        seed: int,
        transform: Transform | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Raises UsageError where there are fewer samples than a batch takes, or nothing to tell a pair from."""
        groups = dataset.group_ids.numpy()
        if options.mask_duplicates and len(dataset) and (groups == groups[0]).all():
            raise UsageError(
                f"all {len(dataset)} samples of {options.data} have the same caption or class, so none is another's "
                "negative and there is nothing to learn"
            )
        self.order = Order(len(dataset), batch_size, seed, groups if dataset.distinct_groups else None)
        self.dataset, self.options = dataset, options
        self.transform, self.tokenizer = transform, tokenizer
        self.skipped = Skipped()
        self.skipped.update(dataset.skipped)
        self._bad: set[int] = set()

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def start(self, step: int, part: slice | None = None) -> Iterator[Batch]:
        """The batches of `step`, `step` + 1, ... without end; of each the rows `part`.

        Raises UsageError when no sample can be read.
        """
        steps = Steps(
            self.dataset,
            self.order,
            part or slice(None),
            self.transform,
            self.tokenizer,
            self.options.mask_duplicates,
        )
        workers = default_workers(self.dataset, self.options)
        for made in loader(steps, itertools.count(step), workers, self.options.prefetch):
            for row, reason in made.bad:
                if row not in self._bad:
                    self._bad.add(row)
                    self.skipped.add(reason, self.dataset.keys[row])
            if made.error is not None:
                raise UsageError(made.error)
            yield made.batch


def in_order(
    dataset: Dataset, options: DataOptions, *, batch_size: int, transform: Transform | None = None
) -> Iterator[Batch]:
    """Every row that can be read once, in order: `image` or `image_features`, and `index`.

    What cannot be read is counted in `dataset.skipped`.
    """
    parts = (range(first, min(first + batch_size, len(dataset))) for first in range(0, len(dataset), batch_size))
    for made in loader(Rows(dataset, transform), parts, default_workers(dataset, options), options.prefetch):
        for row, reason in made.bad:
            dataset.skipped.add(reason, dataset.keys[row])
        if made.batch:
            yield made.batch


class Rows(torch.utils.data.Dataset[Made]):
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
                bad.append((row, str(reason)))
                continue
            images.append(self.transform(image) if self.transform is not None else image)
            taken.append(row)
        key = "image" if self.dataset.image_width is None else "image_features"
        return Made({key: torch.stack(images), "index": torch.tensor(taken)} if taken else {}, bad)


def default_workers(dataset: Dataset, options: DataOptions) -> int:
    """The `workers` asked for; by default none for cached features, which need no work."""
    if options.workers is not None:
        return options.workers
    if isinstance(dataset, FeatureSet):
        return 0
    return max(1, min(8, len(os.sched_getaffinity(0)) - 1 if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


def loader(items: torch.utils.data.Dataset, sampler: Iterable[Any], workers: int, prefetch: int) -> DataLoader:
    """A DataLoader of whole items in the sampler's order, in pinned memory where there is a GPU."""
    return DataLoader(
        items,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),  # its own: the global state is part of what a resumed run restores
    )


def _leave_signals_to_the_parent(worker: int) -> None:
    """A signal to the whole group must not end the workers before the parent has saved; they end when it does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
