"""Drawings made on the fly: pairs that a model can learn, for smoke tests and speed, without a file."""

from __future__ import annotations

import itertools
import random

from PIL import Image, ImageDraw

from cibr.data.dataset import Dataset
from cibr.data.options import DataOptions
from cibr.errors import UsageError

COLOURS = ("red", "green", "blue", "orange", "purple", "black", "gray", "pink", "cyan", "brown")
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {
    f"{v} {h}".replace("middle middle", "in the middle"): (x, y)
    for (y, v), (x, h) in itertools.product(
        enumerate(("top", "middle", "bottom")), enumerate(("left", "middle", "right"))
    )
}
GROUNDS = ("white", "yellow", "beige", "lightblue")
KINDS = list(itertools.product(COLOURS, SHAPES, PLACES, GROUNDS))
SIDE = 64


def caption(kind: int) -> str:
    colour, shape, place, ground = KINDS[kind]
    return f"a {colour} {shape} on {ground}, {place}"


class Synthetic(Dataset):
    """Row i shows kind i modulo 1,440 of colour, shape, place and ground; size and position vary with i."""

    def __init__(self, n: int) -> None:
        labels = [i * 7 % len(KINDS) for i in range(n)]  # 7 is no divisor of 1,440: all attributes vary early
        names = [caption(kind) for kind in range(len(KINDS))]
        super().__init__(
            [f"synthetic-{i}" for i in range(n)],
            [(names[label],) for label in labels],
            labels=labels,
            class_names=names,
            templates=["{}"],
        )

    def image(self, index: int) -> Image.Image:
        """The drawing of row `index`, the same at every call."""
        assert self.labels is not None
        colour, shape, place, ground = KINDS[int(self.labels[index])]
        rng = random.Random(index)
        page = Image.new("RGB", (SIDE, SIDE), ground)
        pen = ImageDraw.Draw(page)
        half = rng.uniform(6, 10)
        x, y = (SIDE * (2 * k + 1) / 6 + rng.uniform(-2, 2) for k in PLACES[place])
        box = (x - half, y - half, x + half, y + half)
        if shape == "circle":
            pen.ellipse(box, fill=colour)
        elif shape == "square":
            pen.rectangle(box, fill=colour)
        elif shape == "triangle":
            pen.polygon(((x, box[1]), (box[2], box[3]), (box[0], box[3])), fill=colour)
        else:
            pen.line(box, fill=colour, width=4)
            pen.line((box[0], box[3], box[2], box[1]), fill=colour, width=4)
        return page


def open_synthetic(text: str, options: DataOptions, split: str) -> Dataset:
    """Raises UsageError if `text` is no number of samples."""
    if not text.isdecimal() or not int(text):
        raise UsageError(f"--data synthetic:{text}: say how many samples, as in synthetic:10000")
    return Synthetic(min(int(text), options.limit or int(text)))
