"""What every data set is: rows of an image and its captions, some with a class or a style, each read when asked for."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cibr.data.strings import Strings, Texts


class SkipSample(Exception):
    """A sample that cannot be used; the message is the reason, worded to be counted (no names or numbers in it)."""


class Skipped:
    """Samples left out: how many for each reason, and the name of the first."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, name: str, count: int = 1) -> None:
        self.first.setdefault(reason, printable(name))
        self.counts[reason] += count

    def update(self, other: Skipped) -> None:
        for reason, count in other.counts.items():
            self.add(reason, other.first[reason], count)

    @property
    def total(self) -> int:
        return self.counts.total()

    def __str__(self) -> str:
        """One line a reason: `3 unreadable image (the first: 000017.jpg in a.tar)`."""
        return "\n".join(f"{n} {reason} (the first: {self.first[reason]})" for reason, n in self.counts.most_common())


def printable(name: str) -> str:
    """A name out of a data set as a terminal may see it: neither its control sequences nor megabytes of it."""
    return "".join(c if c.isprintable() else "?" for c in name[:200])


@dataclass(frozen=True)
class Sample:
    """One row: `image` is RGB, or features (dv,) of a frozen tower; `captions` are texts, or features (k, dt)."""

    key: str
    image: Image.Image | Tensor
    captions: tuple[str, ...] | Tensor
    label: int | None = None
    style: str | None = None


def group_id(text: str) -> int:
    """A caption's or class name's id, 63 bits: equal for equal texts, whatever their case and surrounding space."""
    digest = hashlib.blake2b(text.strip().casefold().encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def fill(template: str, name: str) -> str:
    """Not `str.format`, which would evaluate what a file says."""
    return template.replace("{}", name)


class Dataset:
    """Rows in a fixed order. A source derives from it and says how a row's `image` is read.

    Rows of a class share its group id. Rows without one share an id where their first captions are equal, and within
    a batch pairs do where the captions drawn are.
    """

    distinct_groups = False  # whether a batch takes at most one row of a group
    augment = "model"  # the augmentation that `auto` stands for
    image_width: int | None = None  # of cached features
    text_width: int | None = None

    def __init__(
        self,
        keys: Sequence[str],
        captions: Sequence[tuple[str, ...]],
        *,
        labels: Sequence[int] | None = None,
        class_names: list[str] | None = None,
        templates: list[str] | None = None,
        styles: list[str] | None = None,
        skipped: Skipped | None = None,
    ) -> None:
        self.keys, self.texts = Strings(keys), Texts(captions)
        self.labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)  # (n,) index of class_names
        self.class_names, self.templates = class_names, templates  # a template has one {}
        self.styles = styles  # of every row
        self.skipped = Skipped() if skipped is None else skipped  # what was left out when the rows were listed

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, index: int) -> Image.Image | Tensor:
        """RGB, or features (dv,). Raises SkipSample for what cannot be read."""
        raise NotImplementedError

    def captions(self, index: int) -> tuple[str, ...] | Tensor:
        """All captions of a row, without reading its image: texts, its class in each template, or features (k, dt)."""
        return self.texts[index] or tuple(fill(t, self._class_name(index)) for t in self.templates or ())

    def draw(self, index: int, number: int) -> str | Tensor:
        """One caption of the row, chosen by a random `number` in [0, 2^63): a text, or features (dt,)."""
        captions = self.texts[index]
        if captions:
            return captions[number % len(captions)]
        assert self.templates is not None
        return fill(self.templates[number % len(self.templates)], self._class_name(index))

    def _class_name(self, index: int) -> str:
        assert self.labels is not None and self.class_names is not None
        return self.class_names[int(self.labels[index])]

    def words(self) -> Iterable[str]:
        """Texts that hold every word a caption may have, to make a vocabulary of."""
        return itertools.chain(self.texts.strings, self.class_names or (), self.templates or ())

    def sample(self, index: int) -> Sample:
        """Raises SkipSample for what cannot be read."""
        return Sample(
            self.keys[index],
            self.image(index),
            self.captions(index),
            None if self.labels is None else int(self.labels[index]),
            None if self.styles is None else self.styles[index],
        )

    @property
    def group_ids(self) -> Tensor:
        """(len,) int64, by class where there are classes, otherwise by the first caption."""
        if not hasattr(self, "_group_ids"):
            if self.labels is not None:
                self._group_ids = self.labels
            else:
                first = (self.texts.strings[k] for k in self.texts.starts[:-1])
                self._group_ids = torch.tensor([group_id(text) for text in first], dtype=torch.int64)
        return self._group_ids

    def one_group(self) -> bool:
        """Whether no row is ever a negative of another: one class, or one caption."""
        if self.labels is not None:
            return bool((self.labels == self.labels[0]).all())
        return all(text == self.texts.strings[0] for text in self.texts.strings)

    def take(self, rows: np.ndarray) -> Dataset:
        """The data set of these `rows` (m,) int64, in their order; its classes are those that are left."""
        return Subset(self, rows)

    def sizes(self) -> np.ndarray:
        """What besides names and captions tells a changed set from this one: by default nothing."""
        return np.zeros(0, np.int64)

    def fingerprint(self) -> str:
        """A hash of the rows' names, captions, classes and sizes; the folder they lie in does not matter."""
        digest = hashlib.sha256()
        for strings in (self.keys, self.texts.strings):
            digest.update(strings.starts.tobytes() + strings.bytes.tobytes())
        digest.update(self.texts.starts.tobytes() + self.sizes().tobytes())
        if self.labels is not None:
            names = "\n".join([*(self.class_names or ()), *(self.templates or ())])
            digest.update(self.labels.numpy().tobytes() + names.encode())
        return digest.hexdigest()


class Subset(Dataset):
    """Some rows of another data set, which reads them."""

    def __init__(self, base: Dataset, rows: np.ndarray) -> None:
        self.base, self.rows = base, rows
        labels, names = classes_left(base, rows)
        super().__init__(
            [base.keys[row] for row in rows.tolist()],
            [base.texts[row] for row in rows.tolist()],
            labels=None if labels is None else labels.tolist(),
            class_names=names,
            templates=base.templates,
            styles=None if base.styles is None else [base.styles[row] for row in rows.tolist()],
            skipped=base.skipped,
        )
        self.distinct_groups, self.augment = base.distinct_groups, base.augment

    def image(self, index: int) -> Image.Image | Tensor:
        return self.base.image(int(self.rows[index]))

    def captions(self, index: int) -> tuple[str, ...] | Tensor:
        return self.base.captions(int(self.rows[index]))

    def draw(self, index: int, number: int) -> str | Tensor:
        return self.base.draw(int(self.rows[index]), number)

    def words(self) -> Iterable[str]:
        return self.base.words()  # the vocabulary is the same for every split

    def sizes(self) -> np.ndarray:
        return self.rows


def classes_left(dataset: Dataset, rows: np.ndarray) -> tuple[Tensor | None, list[str] | None]:
    """Labels (m,) of the rows, counted anew from 0, and the names of the classes that have one of them."""
    if dataset.labels is None or dataset.class_names is None:
        return None, None
    left, labels = dataset.labels[torch.from_numpy(rows)].unique(return_inverse=True)
    return labels, [dataset.class_names[c] for c in left.tolist()]
