"""Images like those of dSprites, drawn here: one white shape on black, five independent factors, 32 x 32.

    shape         square, ellipse, heart
    scale         6, from half of the full size to all of it
    orientation   8 over a quarter turn, so that a square's are all different
    x, y          16 each, of the centre, over the middle half of the image

A pixel is the mean of 2 x 2 points, each inside or outside by the shape's inequality in its own coordinates (u, v):

    square    max(|u|, |v|) <= 0.8
    ellipse   u^2 + (v / 0.55)^2 <= 1
    heart     (u^2 + v^2 - 0.6)^3 <= u^2 v^3

All 36,864 images differ.  A sample is without replacement, so that no image is in two splits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE, POINTS = 32, 64  # pixels, and points a pixel's mean is of, a side
RADIUS, REACH = 0.36, 0.5  # of the largest shape, and of its centre, where the image is [-1, 1]^2
FACTORS = {"shape": 3, "scale": 6, "orientation": 8, "x": 16, "y": 16}


def sample(n: int, seed: int) -> dict[str, Tensor]:
    """n different images' factors by name, (n,) int64 each.  Raises ValueError for more than there are."""
    total = math.prod(FACTORS.values())
    if n > total:
        raise ValueError(f"there are {total} images, not {n}")
    number = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:n]
    factors = {}
    for name, size in FACTORS.items():
        factors[name], number = number % size, number // size
    return factors


def draw(factors: dict[str, Tensor], chunk: int = 500) -> Tensor:
    """Factors (n,) each -> (n, 32, 32) float32 in [0, 1]."""
    n = len(factors["shape"])
    return torch.cat([_draw({k: v[i : i + chunk] for k, v in factors.items()}) for i in range(0, n, chunk)])


def _draw(factors: dict[str, Tensor]) -> Tensor:
    def spread(name: str, low: float, high: float) -> Tensor:
        steps = FACTORS[name] - 1
        return (low + (high - low) * factors[name] / steps).view(-1, 1, 1)

    line = (torch.arange(POINTS) + 0.5) / POINTS * 2 - 1
    across, down = line.view(1, 1, -1) - spread("x", -REACH, REACH), line.view(1, -1, 1) - spread("y", -REACH, REACH)
    radius = RADIUS * spread("scale", 0.5, 1.0)
    angle = (factors["orientation"] * (math.pi / 2 / FACTORS["orientation"])).view(-1, 1, 1)
    u = (across * angle.cos() + down * angle.sin()) / radius
    v = (down * angle.cos() - across * angle.sin()) / radius
    square = torch.maximum(u.abs(), v.abs()) <= 0.8
    ellipse = u.square() + (v / 0.55).square() <= 1
    heart = (u.square() + v.square() - 0.6) ** 3 <= u.square() * v**3
    inside = torch.stack([square, ellipse, heart])[factors["shape"], torch.arange(len(u))]
    return F.avg_pool2d(inside.float()[:, None], POINTS // SIDE)[:, 0]


def one_hots(factors: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    """The named factors as one-hots side by side: (n, sum of sizes)."""
    return torch.cat([F.one_hot(factors[name], FACTORS[name]).float() for name in names], 1)
