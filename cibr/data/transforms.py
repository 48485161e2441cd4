"""From an image to a tensor: the model's own transform, after an augmentation where one is asked for."""

from __future__ import annotations

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
    rng = np.random.default_rng(int(torch.randint(2**62, ())))
    width, height = image.size
    zoom, turn = rng.uniform(0.85, 1.5), rng.uniform(-0.15, 0.15)
    mirror = rng.choice([-1.0, 1.0])
    shift_x, shift_y = rng.uniform(-0.075, 0.075, 2) * image.size
    linear = zoom * np.array([[mirror * np.cos(turn), -np.sin(turn)], [mirror * np.sin(turn), np.cos(turn)]])
    middle = np.array([width / 2, height / 2])
    offset = middle - linear @ middle + (shift_x, shift_y)
    placed = (linear[0, 0], linear[0, 1], offset[0], linear[1, 0], linear[1, 1], offset[1])
    image = image.transform(image.size, Image.Transform.AFFINE, placed, Image.Resampling.BILINEAR, fillcolor="white")
    if rng.integers(2):
        mix = torch.lerp(torch.eye(3), torch.from_numpy(rng.dirichlet(np.ones(3), 3)).float(), float(rng.uniform()))
        rows = torch.cat([mix, torch.zeros(3, 1)], dim=1).flatten()
        image = image.convert("RGB", tuple(rows.tolist()))
    return image
