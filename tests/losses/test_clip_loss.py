"""clip_loss: the kernel against float64 on every instruction set, by the one tolerance rule."""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
from cases import DTYPES, ISAS, LARGE, each_dtype, each_isa, towers, with_gradients
from covering import each_pair
from rectangular import rectangular_clip_loss
from torch import Tensor

import cibr_kernels as ck
from cibr_kernels import testing
from cibr_kernels.losses.clip.reference import clip_loss as reference

# (n, m, first_positive, d): one pair, smaller than a tile (32), whole tiles, ragged in every dimension, a rectangle,
# more than one panel of rows (384 or 512)
SHAPES = [
    (1, 1, 0, 8),
    (2, 2, 0, 3),
    (5, 5, 0, 31),
    (64, 64, 0, 32),
    (33, 33, 0, 100),
    (40, 100, 17, 65),
    (300, 301, 1, 33),
]
DEEP = (48, 48, 0, 700)  # past one sweep of depth (384 or 512)
PANELS = (600, 4500, 1000, 40)  # two panels of rows, two chunks of columns (128 blocks of 32)
WHOLE = (600, 640, 20, 64)  # y in whole blocks: in float32 its transpose takes the place of dy
NAMES = ("loss", "dx", "dy", "dscale")


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    kind: str
    scale: float
    one_way: bool


@functools.lru_cache(maxsize=2)  # the instruction sets of one case follow one another
def expected(case: Case) -> tuple[tuple[Tensor, ...], list[Tensor], list[Tensor], float, list[float]]:
    """Inputs, eager PyTorch's outputs, the truth, the largest logit, and the sizes of the terms of each output."""
    n, m, first_positive, d = case.shape
    x, y = (t.to(case.dtype) for t in towers(n, m, d, first_positive, case.kind))
    inputs = x, y, torch.tensor(case.scale)

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return reference(x, y, scale, first_positive, case.one_way)

    eager, truth = with_gradients(loss, *inputs), with_gradients(loss, *inputs, dtype=torch.float64)
    x, y = x.double(), y.double()
    cosines = x @ y.T
    g = weights(case.scale * cosines, first_positive, case.one_way)
    magnitudes = [0.0, 0.0, 0.0, (g * cosines).abs().sum().item()]
    if case.kind == "opposed":  # rows that nearly coincide: sum_j G_ij y_j cancels
        magnitudes[1:3] = [(case.scale * h @ t.abs()).max().item() for h, t in ((g.abs(), y), (g.T.abs(), x))]
    return inputs, eager, truth, (case.scale * cosines).abs().max().item(), magnitudes


def weights(logits: Tensor, first_positive: int, one_way: bool) -> Tensor:
    """(n, m): d loss / d logits, accurate enough to say how large the terms of a cancelling sum are."""
    n = logits.shape[0]
    g = logits.softmax(1)
    if not one_way:
        g[:, first_positive : first_positive + n] += logits[:, first_positive : first_positive + n].softmax(0)
    g.diagonal(first_positive)[:n] -= 1 if one_way else 2
    return g / (n if one_way else 2 * n)


def check(case: Case, isa: str, budgets: tuple[int, ...] = (0, LARGE)) -> None:
    """Holds the kernel to the rule in both tiers: exponentials computed again, and kept."""
    inputs, eager, truth, exponent, magnitudes = expected(case)
    _, m, first_positive, d = case.shape

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return rectangular_clip_loss(x, y, scale, first_positive=first_positive, one_way=case.one_way, backend="native")

    for budget in budgets:
        ck.set_stash_budget(budget)
        with testing.instruction_set(isa):
            actual = with_gradients(loss, *inputs)
        for name, a, e, t, magnitude in zip(NAMES, actual, eager, truth, magnitudes, strict=True):
            name = f"{name}, stash budget {budget}"
            testing.assert_close(
                name, a, e, t, terms=m + d, exponent=exponent, features=case.dtype, magnitude=magnitude
            )


# at a scale of 100 an unmasked column hides; at 1 a bad first positive hides
@each_pair(shape=SHAPES, dtype=DTYPES, scale=(1.0, 14.3, 100.0), one_way=(False, True), isa=ISAS)
def test_kernel_matches_float64(shape, dtype, scale, one_way, isa):
    check(Case(shape, dtype, "unit", scale, one_way), isa)


@each_pair(
    shape=[(5, 5, 0, 31), (33, 33, 0, 100), (40, 100, 17, 65), (300, 301, 1, 33)],
    regime=[("raw", 1.0), ("raw", 14.3), ("opposed", 100.0)],
    dtype=DTYPES,
    isa=ISAS,
)
def test_kernel_keeps_a_maximum_where_one_exponent_is_not_enough(shape, regime, dtype, isa):
    check(Case(shape, dtype, *regime, False), isa)


@each_isa
@each_dtype
def test_features_wider_than_one_sweep(dtype, isa):
    check(Case(DEEP, dtype, "unit", 14.3, False), isa)


@each_pair(shape=[PANELS, WHOLE], dtype=DTYPES, kind=["unit", "raw"], isa=ISAS)
def test_several_panels_and_chunks(shape, dtype, kind, isa):
    check(Case(shape, dtype, kind, 14.3, False), isa)


@each_isa
@pytest.mark.parametrize("one_way", [False, True])
def test_one_row_far_below_the_shared_exponent(one_way, isa):
    # positive -60 and negatives -50 under a bound of 100: exp(l - 40) is zero in float32
    x, y = torch.tensor([[10.0, 0.0]]), torch.tensor([[-6.0, 8.0], [-5.0, 0.0], [-5.0, 0.0]])
    with testing.instruction_set(isa):
        loss = rectangular_clip_loss(x, y, torch.tensor(1.0), one_way=one_way, backend="native")
    torch.testing.assert_close(loss, reference(x, y, torch.tensor(1.0), 0, one_way))


def chunked(x: Tensor, y: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The symmetric loss, 500 rows at a time; logits this small need no maximum."""
    x, y = x.to(dtype), y.to(dtype)
    rows, cols = [], torch.zeros(len(y), dtype=dtype)
    for part in x.split(500):
        e = (scale * (part @ y.T)).exp_()
        rows.append(e.sum(1))
        cols += e.sum(0)
    return (torch.cat(rows).log() + cols.log() - 2 * scale * (x * y).sum(1)).mean() / 2


@pytest.mark.slow
def test_twenty_thousand_rows():
    x, y = towers(20_000, 20_000, 16)
    with torch.no_grad():
        actual = ck.clip_loss(x, y, 14.3)
        eager, truth = chunked(x, y, 14.3, torch.float32), chunked(x, y, 14.3, torch.float64)
    testing.assert_close("loss", actual, eager, truth, terms=20_016, exponent=14.3, features=torch.float32)
