"""dot_moments: the kernel against float64 on every instruction set."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from cases import DTYPES, ISAS, each_isa, towers, with_gradients
from covering import each_pair
from torch import Tensor

from cibr_kernels import testing
from cibr_kernels.information.dot_moments import dot_moments
from cibr_kernels.numerics import promote
from cibr_kernels.primitives.additive.moments.reference import moments, pair_mask

WEIGHTS = (0.7, -1.3)  # of J and L: neither DV's nor each other's
SHAPES = [(2, 2, 0, 3), (5, 5, 0, 31), (64, 64, 0, 32), (33, 33, 0, 100), (40, 100, 17, 65), (300, 301, 1, 33)]
PANELS = (600, 4500, 1000, 40)
NAMES = ("J", "L", "df", "dg")


def reference(f: Tensor, g: Tensor, first_positive: int, include: bool = False) -> tuple[Tensor, Tensor]:
    """f (n, k), g (m, k) -> J (), L (): the specification."""
    return moments(promote(f) @ promote(g).T, first_positive, include)


@functools.lru_cache(maxsize=2)
def expected(shape: tuple, dtype: torch.dtype, kind: str, scale: float, include: bool):
    n, m, first_positive, k = shape
    f, g = towers(n, m, k, first_positive, kind)
    f, g = (f * scale).to(dtype), g.to(dtype)

    def defined(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return reference(f, g, first_positive, include)

    eager = with_gradients(defined, f, g, weights=WEIGHTS)
    truth = with_gradients(defined, f, g, weights=WEIGHTS, dtype=torch.float64)
    f64, g64 = f.double(), g.double()
    scores = f64 @ g64.T
    pairs = n * m - (0 if include else n)
    mask = pair_mask(n, m, first_positive, include, f.device)
    weight = abs(WEIGHTS[1]) * (scores - truth[1]).exp() / pairs * mask
    weight.diagonal(first_positive)[:n] += WEIGHTS[0] / n
    magnitudes = [
        (f64 * g64[first_positive : first_positive + n]).abs().sum(1).mean().item(),  # J
        abs(truth[1].item() + math.log(pairs)) + math.log(pairs),  # L = LSE - log |P|
        0.0,
        0.0,
    ]
    if kind == "opposed":  # rows that nearly coincide: sum_j G_ij g_j cancels
        magnitudes[2:] = [(weight @ g64.abs()).max().item(), (weight.T @ f64.abs()).max().item()]
    return (f, g), eager, truth, scores.abs().max().item(), magnitudes


def check(shape: tuple, dtype: torch.dtype, kind: str, scale: float, include: bool, isa: str) -> None:
    inputs, eager, truth, exponent, magnitudes = expected(shape, dtype, kind, scale, include)
    _, m, first_positive, k = shape

    def moments(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return dot_moments(f, g, first_positive=first_positive, include_diagonal=include, backend="native")

    with testing.instruction_set(isa):
        actual = with_gradients(moments, *inputs, weights=WEIGHTS)
    for name, a, e, t, magnitude in zip(NAMES, actual, eager, truth, magnitudes, strict=True):
        testing.assert_close(name, a, e, t, terms=m + k, exponent=exponent, features=dtype, magnitude=magnitude)


@each_pair(shape=SHAPES, dtype=DTYPES, scale=(1.0, 14.3, 100.0), include=(False, True), isa=ISAS)
def test_kernel_matches_float64(shape, dtype, scale, include, isa):
    check(shape, dtype, "unit", scale, include, isa)


@each_pair(
    shape=[(5, 5, 0, 31), (40, 100, 17, 65), (300, 301, 1, 33)],
    regime=[("raw", 1.0), ("raw", 3.0), ("opposed", 100.0)],
    dtype=DTYPES,
    include=(False, True),
    isa=ISAS,
)
def test_kernel_keeps_a_maximum_where_one_exponent_is_not_enough(shape, regime, dtype, include, isa):
    check(shape, dtype, *regime, include, isa)


@each_isa
@pytest.mark.parametrize("kind", ["unit", "raw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_panels_and_chunks(dtype, kind, isa):
    check(PANELS, dtype, kind, 3.0, False, isa)


@each_isa
def test_one_row_far_below_the_shared_exponent(isa):
    f, g = torch.tensor([[10.0, 0.0]]), torch.tensor([[-6.0, 8.0], [-5.0, 0.0], [-5.0, 0.0]])
    with testing.instruction_set(isa):
        j, el = dot_moments(f, g, backend="native")
    assert (j.item(), el.item()) == pytest.approx((-60, -50), rel=1e-6)


@each_isa
@pytest.mark.parametrize(("grad_j", "grad_l"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1.0, -2.5)])
def test_each_moment_alone(grad_j, grad_l, isa):
    f, g = towers(40, 100, 65, 17)
    kernel = functools.partial(dot_moments, first_positive=17, backend="native")
    with testing.instruction_set(isa):
        actual = with_gradients(kernel, f, g, weights=(grad_j, grad_l))
    truth = with_gradients(lambda f, g: reference(f, g, 17), f, g, weights=(grad_j, grad_l), dtype=torch.float64)
    for a, t in zip(actual, truth, strict=True):
        torch.testing.assert_close(a.double(), t, rtol=1e-5, atol=1e-7)
