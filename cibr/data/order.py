"""Which rows a step takes: a function of seed and step alone, so a run resumes exactly and on any number of ranks."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from cibr.errors import UsageError


def random_numbers(seed: int, step: int, rows: np.ndarray, *more: int) -> np.ndarray:
    """(n,) int64 in [0, 2^63), a function of (seed, step, row) each and of `more`: SplitMix64's finaliser, once per
    argument.
    """
    mixed = np.zeros(len(rows), np.uint64)
    for argument in (np.uint64(seed), np.uint64(step), rows.astype(np.uint64), *map(np.uint64, more)):
        mixed = mixed + argument + np.uint64(0x9E3779B97F4A7C15)  # the golden ratio: 0 is no fixed point
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return (mixed >> np.uint64(1)).astype(np.int64)


class Order:
    """Epochs over groups in random order, of each group one row at random; without groups every row is its own."""

    def __init__(self, n: int, batch_size: int, seed: int, groups: np.ndarray | None = None) -> None:
        """`groups` (n,) are the rows' ids. Raises UsageError where there are too few for a batch."""
        self.alone = groups is None
        ids = np.arange(n) if groups is None else groups
        self.by_group = np.argsort(ids, kind="stable")
        _, self.first, self.count = np.unique(ids[self.by_group], return_index=True, return_counts=True)
        self.batch_size, self.seed = batch_size, seed
        if batch_size > len(self.first):
            what = "samples" if groups is None else "concepts (distinct captions or classes)"
            raise UsageError(f"--batch-size {batch_size} is more than the {len(self.first)} {what} there are")
        self.steps_per_epoch = len(self.first) // batch_size
        self._shuffled = lru_cache(2)(self._shuffle)

    def rows(self, step: int, attempt: int = 0) -> np.ndarray:
        """(batch_size,) rows; a further `attempt` gives each place another row, a batch later in the same order."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        places = (batch + attempt) * self.batch_size + np.arange(self.batch_size)
        groups = self._shuffled(epoch)[places % len(self.first)]
        if self.alone:
            return groups
        number = random_numbers(self.seed, step, groups) % self.count[groups]
        return self.by_group[self.first[groups] + number]

    @property
    def attempts(self) -> int:
        """After so many attempts every place has seen every group it can."""
        return len(self.first) // self.batch_size + 1

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.first))


class Partners:
    """Of each row another one of its class or concept; the row itself where there is none."""

    def __init__(self, groups: np.ndarray | None) -> None:
        """`groups` (n,) are the rows' ids; None: every row is alone."""
        self.groups = groups
        if groups is not None:
            self.by_group = np.argsort(groups, kind="stable")
            self.place = np.empty(len(groups), np.int64)
            self.place[self.by_group] = np.arange(len(groups))
            _, of, count = np.unique(groups, return_inverse=True, return_counts=True)
            starts = np.concatenate([[0], np.cumsum(count)[:-1]])
            self.first, self.count = starts[of], count[of]

    def of(self, rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """(n,) rows, each chosen uniformly by its random number in [0, 2^63) among the others of its group."""
        if self.groups is None:
            return rows
        first, count = self.first[rows], self.count[rows]
        further = 1 + numbers % np.maximum(count - 1, 1)
        return self.by_group[first + (self.place[rows] - first + further) % count]
