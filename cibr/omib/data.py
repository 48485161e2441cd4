"""What `--data` names: three splits of views and a target, standardised by the training rows.

sim:NAME     Gaussian views of known Bayes accuracy         cibr/omib/sim.py
cremad:DIR   CREMA-D, sound and face, six emotions          cibr/omib/cremad.py
mosi:FILE    MOSI, text, sound and face, a sentiment        cibr/omib/mosi.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cibr.errors import UsageError
from cibr.omib.tasks import Task

SMALLEST_STD = 1e-6  # a column that varies less is a constant


@dataclass(frozen=True)
class Split:
    views: tuple[Tensor, ...]  # (n, d_i) float32 each
    target: Tensor  # (n,)

    def __len__(self) -> int:
        return len(self.target)

    def batch(self, rows: Tensor | slice = slice(None)) -> dict[str, Tensor]:
        return {**{f"view_{i}": view[rows] for i, view in enumerate(self.views)}, "target": self.target[rows]}


@dataclass(frozen=True)
class Data:
    train: Split
    val: Split
    test: Split
    classes: int = 2
    ceiling: dict[str, float] = field(default_factory=dict)  # the best that any predictor can reach, where it is known
    notes: tuple[str, ...] = ()  # what somebody who uses it should know

    @property
    def widths(self) -> list[int]:
        return [view.shape[1] for view in self.train.views]

    def standardised(self) -> Data:
        """Columns of mean 0 and variance 1 over the training rows; constant ones become 0."""
        moments = [(v.mean(0), v.std(0)) for v in self.train.views]

        def scaled(split: Split) -> Split:
            pairs = zip(split.views, moments, strict=True)
            return replace(
                split, views=tuple((v - mean) / _safe(std) * (std > SMALLEST_STD) for v, (mean, std) in pairs)
            )

        return replace(self, train=scaled(self.train), val=scaled(self.val), test=scaled(self.test))

    def check(self, task: Task) -> None:
        """Raises UsageError where the splits do not fit one another or the task."""
        for name, split in (("training", self.train), ("validation", self.val), ("test", self.test)):
            if len(split) < 2:
                raise UsageError(f"the {name} split has {len(split)} rows, and two are needed")
            for i, (view, width) in enumerate(zip(split.views, self.widths, strict=True)):
                if view.shape != (len(split), width):
                    raise UsageError(f"view {i} of the {name} split is {tuple(view.shape)}, not {(len(split), width)}")
                if not torch.isfinite(view).all():
                    raise UsageError(f"view {i} of the {name} split has values that are not finite")
            task.check(split.target, name == "training")


def _safe(std: Tensor) -> Tensor:
    return torch.where(std > SMALLEST_STD, std, 1.0)


def normal_only(data: Data) -> Data:
    """Training rows of target 0 alone, for one-class tasks."""
    keep = data.train.target == 0
    return replace(data, train=Split(tuple(v[keep] for v in data.train.views), data.train.target[keep]))


def open_data(text: str, task: str, *, train: int, test: int, seed: int) -> Data:
    """`KIND:PLACE` for a task -> standardised data.  Raises UsageError for what is not there or does not fit."""
    kind, _, place = text.partition(":")
    if kind not in KINDS or not place:
        raise UsageError(f"--data is {text!r}, but must be one of {', '.join(KINDS.values())}")
    if kind == "sim":
        from cibr.omib import sim

        data = sim.draw(sim.named(place), task, train=train, test=test, seed=seed)
    elif kind == "cremad":
        from cibr.omib import cremad

        require(task, ("class", "anomaly"), "CREMA-D has classes")
        data = cremad.read(place, anomaly=task == "anomaly")
    else:
        from cibr.omib import mosi

        require(task, ("value",), "MOSI has a number to predict")
        data = mosi.read(place)
    return (normal_only(data) if task == "anomaly" else data).standardised()


KINDS = {"sim": "sim:I, sim:II, sim:III, sim:III-3", "cremad": "cremad:DIR", "mosi": "mosi:FILE"}


def require(task: str, known: Sequence[str], what: str) -> None:
    if task not in known:
        raise UsageError(f"{what}: --task must be {' or '.join(known)}, not {task}")
