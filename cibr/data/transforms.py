"""From an image to a tensor: the model's own transform, after an augmentation where one is asked for."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Transform = Callable[[Image.Image], Tensor]
Tokenizer = Callable[[list[str]], Tensor]  # n texts -> (n, length) int64


@contextmanager
def own_random_state() -> Iterator[Callable[[int], None]]:
    """Yields a function that seeds every global generator a transform may use; all are put back afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def seed(number: int) -> None:
        random.seed(number)
        np.random.seed(number & 0xFFFFFFFF)
        torch.default_generator.manual_seed(number)

    try:
        yield seed
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def training_transform(augment: str, model_transform: Callable[[bool], Transform]) -> Transform:
    """`model`: the model's training transform; `none`: its evaluation transform; `drawing`: that after `redraw`."""
    if augment == "model":
        return model_transform(True)
    evaluation = model_transform(False)
    return Redrawn(evaluation) if augment == "drawing" else evaluation


class Redrawn:
    """A transform after `redraw`; a class so that worker processes can receive it."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> Tensor:
        return self.transform(redraw(image))


def redraw(image: Image.Image) -> Image.Image:
    """Zooms, shifts, turns and mirrors a drawing on white at random, and recolours half of them.

    Zoom of 2/3 to 1.18 (vendors leave different margins), turns of 0.15 radians, shifts of 7.5 % either way.
    Recolouring mixes the channels with rows that sum to 1, so white stays white and grey stays grey.
    """
    width, height = image.size
    zoom, turn, mirror = random.uniform(0.85, 1.5), random.uniform(-0.15, 0.15), random.choice((-1, 1))
    cos, sin = zoom * math.cos(turn), zoom * math.sin(turn)
    to_x, to_y = (mirror * cos, -sin), (mirror * sin, cos)  # from a place on the new page to one on the old
    middle = (width / 2, height / 2)
    left = middle[0] * (1 + random.uniform(-0.15, 0.15)) - to_x[0] * middle[0] - to_x[1] * middle[1]
    top = middle[1] * (1 + random.uniform(-0.15, 0.15)) - to_y[0] * middle[0] - to_y[1] * middle[1]
    data = (*to_x, left, *to_y, top)
    image = image.transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor="white")
    return image.convert("RGB", recolouring(random.random())) if random.random() < 0.5 else image


def recolouring(strength: float) -> tuple[float, ...]:
    """Pillow's matrix (12 numbers) from the identity, at 0, to rows from the uniform distribution of three shares."""
    matrix: list[float] = []
    for channel in range(3):
        shares = [random.expovariate(1) for _ in range(3)]
        matrix += [strength * share / sum(shares) + (1 - strength) * (k == channel) for k, share in enumerate(shares)]
        matrix.append(0.0)
    return tuple(matrix)
