"""Batches, made by worker processes; each a function of seed and step, whatever the number of workers and ranks.

A batch is a dictionary:

    image            (n, 3, size, size) float32, through the transform; or image_features (n, dv) float32
    text             (n, length) int64, through the tokenizer; or text_features (n, dt) float32
    group_ids        (n,) int64, equal for pairs that are no negatives of each other; absent without `mask_duplicates`
    index            (n,) int64, rows of the data set

and what else of each row the objective needs (`cibr.needs`).
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from cibr.data.dataset import Dataset, Skipped
from cibr.data.features import FeatureSet
from cibr.data.options import DataOptions, require_read
from cibr.data.order import Order
from cibr.data.steps import Made, Rows, Steps
from cibr.data.stream import Stream, StreamSteps
from cibr.data.transforms import Tokenizer, Transform
from cibr.errors import UsageError
from cibr.needs import Needs

Batch = dict[str, Tensor]


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
        needs: Needs = Needs(),
    ) -> None:
        """Raises UsageError where there are fewer samples than a batch takes, nothing to tell a pair from, or options
        that this kind of data does not have; and where a stream, whose rows are not known, would have to give more of
        one.
        """
        require_read(options)
        if needs and isinstance(dataset, Stream):
            raise UsageError(f"{options.data} is streamed, and this objective wants several views or captions of a row")
        self.dataset, self.options, self.batch_size, self.seed = dataset, options, batch_size, seed
        self.transform, self.tokenizer, self.needs = transform, tokenizer, needs
        self.order = None if isinstance(dataset, Stream) else make_order(dataset, options, batch_size, seed)
        self.steps_per_epoch = None if self.order is None else self.order.steps_per_epoch  # of a stream not known
        self.skipped = Skipped()
        self.skipped.update(dataset.skipped)
        self._seen: set[tuple[str, str]] = set()
        self._news: set[tuple[str, str]] = set()  # that other ranks do not know of

    def start(self, step: int, part: slice | None = None) -> Iterator[Batch]:
        """The batches of `step`, `step` + 1, ... without end; of each the rows `part`.

        Raises UsageError when no sample can be read, or a worker dies.
        """
        with dead_workers_in_words():
            for made in self._loader(step, part or slice(None)):
                self._news |= self._count(set(made.bad))
                if made.error is not None:
                    raise UsageError(made.error)
                if not self.options.mask_duplicates:
                    for name in [name for name in made.batch if name.startswith("group_ids")]:
                        del made.batch[name]
                yield made.batch

    def share(self, union: Callable[[set[tuple[str, str]]], set[tuple[str, str]]]) -> None:
        """Counts what other ranks could not read since the last call; `union` is of all ranks' sets, which all call."""
        self._count(union(self._news))
        self._news = set()

    def _count(self, bad: set[tuple[str, str]]) -> set[tuple[str, str]]:
        """Counts each (name, reason) once; returns those that were new."""
        new = bad - self._seen
        for name, reason in sorted(new):
            self.skipped.add(reason, name)
        self._seen |= new
        return new

    def _loader(self, step: int, part: slice) -> Iterable[Made]:
        workers, prefetch = default_workers(self.dataset, self.options), self.options.prefetch
        if self.order is not None:
            steps = Steps(self.dataset, self.order, part, self.transform, self.tokenizer, self.needs)
            return loader(steps, itertools.count(step), workers, prefetch)
        assert isinstance(self.dataset, Stream)
        size = len(range(self.batch_size)[part])
        stream = StreamSteps(self.dataset, step, size, self.seed, self.transform, self.tokenizer, workers)
        return loader(stream, None, workers, prefetch)


def make_order(dataset: Dataset, options: DataOptions, batch_size: int, seed: int) -> Order:
    groups = dataset.group_ids.numpy() if dataset.distinct_groups else None
    order = Order(len(dataset), batch_size, seed, groups)
    if options.mask_duplicates and dataset.one_group():
        raise UsageError(
            f"all {len(dataset)} samples of {options.data} have the same caption or class, so none is another's "
            "negative and there is nothing to learn"
        )
    return order


def in_order(
    dataset: Dataset, options: DataOptions, *, batch_size: int, transform: Transform | None = None
) -> Iterator[Batch]:
    """Every row that can be read once, in order: `image` or `image_features`, and `index`.

    What cannot be read is counted in `dataset.skipped`.
    """
    parts = (range(first, min(first + batch_size, len(dataset))) for first in range(0, len(dataset), batch_size))
    bar = tqdm(total=len(dataset), desc="reading", unit="sample", leave=False, delay=2, disable=None)
    with dead_workers_in_words(), bar:
        for made in loader(Rows(dataset, transform), parts, default_workers(dataset, options), options.prefetch):
            for name, reason in made.bad:
                dataset.skipped.add(reason, name)
            bar.update(len(made.bad) + len(made.batch.get("index", ())))
            if made.batch:
                yield made.batch


def default_workers(dataset: Dataset, options: DataOptions) -> int:
    """The `workers` asked for; by default none for cached features, which need no work."""
    if options.workers is not None:
        return options.workers
    if isinstance(dataset, FeatureSet):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shards = len(dataset.urls) if isinstance(dataset, Stream) else cores
    return max(1, min(8, cores - 1, shards // int(os.environ.get("WORLD_SIZE", "1"))))


def loader(items: Any, sampler: Iterable[Any] | None, workers: int, prefetch: int) -> Iterable[Any]:
    """Whole items in the sampler's order, in pinned memory where there is a GPU."""
    pin = torch.cuda.is_available()
    if not workers:  # a DataLoader would do the same, at 0.3 ms an item
        made = items if sampler is None else map(items.__getitem__, sampler)
        return map(Made.pin_memory, made) if pin else made
    return DataLoader(
        items,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        multiprocessing_context="fork" if sys.platform == "linux" else None,  # Python's own choice from 3.14 on copies
        prefetch_factor=prefetch,
        pin_memory=pin,
        worker_init_fn=leave_signals_to_the_parent,
        generator=torch.Generator(),  # its own: the global state is part of what a resumed run restores
    )


@contextmanager
def dead_workers_in_words() -> Iterator[None]:
    """Raises UsageError in the block if a worker dies, of too little memory or a decoder's fault."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        words = f"a process that makes batches died ({error}); fewer --workers and --prefetch take less memory"
        raise UsageError(words) from error


def leave_signals_to_the_parent(worker: int) -> None:
    """A signal to the whole group must not end the workers before the parent has saved; they end when it does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
