"""Images as a worse camera would see them, to test on: a small cousin of ImageNet-C (1903.12261).

Row i is damaged in the way i mod 4, at one strength, by random numbers of its own: the same every time.

    noise    Gaussian, standard deviation 0.12 of the range
    blur     Gaussian, radius 1/24 of the short side
    fog      40 % of the contrast, towards white
    pixels   a third of the resolution
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter
from torch import Tensor

from cibr.data.dataset import Dataset, Subset
from cibr.errors import UsageError


class Corrupted(Subset):
    """All rows of a data set of images, damaged."""

    def __init__(self, base: Dataset) -> None:
        """Raises UsageError for cached features."""
        if base.image_width is not None:
            raise UsageError("cached features have no pixels to damage: give the images they were made of")
        super().__init__(base, np.arange(len(base)))

    def image(self, index: int) -> Image.Image:
        image = super().image(index)
        assert not isinstance(image, Tensor)
        return KINDS[index % len(KINDS)](image, np.random.default_rng(index))


def noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    values = np.asarray(image) + rng.normal(0, 0.12 * 255, (image.height, image.width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(min(image.size) / 24))


def fog(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return Image.blend(Image.new("RGB", image.size, "white"), image, 0.4)


def pixels(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    coarse = (max(1, image.width // 3), max(1, image.height // 3))
    small = image.resize(coarse, Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


KINDS: tuple[Callable[[Image.Image, np.random.Generator], Image.Image], ...] = (noise, blur, fog, pixels)
