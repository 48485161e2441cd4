"""Errors of the activations and their slopes against float64, through additive_scores: one unit, so S = phi(a + b).

The bounds stand in csrc/additive/activations.h and may not grow.  Where an activation has two forms both are measured:
a and b of moderate size, whose exponentials are products of factors, and wide ones, whose are not.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import each_isa
from torch import Tensor

from cibr_kernels import testing
from cibr_kernels.primitives.additive.activations import ACTIVATIONS
from cibr_kernels.primitives.additive.scores.op import additive_scores
from cibr_kernels.primitives.additive.shifts.op import additive_shifts

# elu with alpha = 1 has a form of its own
SMOOTH = ["gelu", "gelu_tanh", "silu", "elu", "elu_of_1", "softplus", "tanh"]
KEEP_DIGITS = ["silu", "elu", "elu_of_1", "softplus", "tanh"]  # of phi itself where t is tiny
FIT_PIECES = Path(__file__).resolve().parents[2] / "csrc/additive/fit_polynomials.py"

each_smooth = pytest.mark.parametrize("activation", SMOOTH)


def named(case: str) -> tuple[str, float]:
    """The activation, and elu's alpha (or a slope that means nothing)."""
    return ("elu", 1.0) if case == "elu_of_1" else (case, 0.7)


def exact(case: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """phi and phi' of float64 t, with the digits that the reference's formulas lose where phi is tiny."""
    activation, alpha = named(case)
    if activation == "gelu":
        cdf = torch.special.erfc(-t / math.sqrt(2)) / 2
        return t * cdf, cdf + t * torch.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    if activation == "softplus":
        return t.clamp(min=0) + torch.log1p(torch.exp(-t.abs())), torch.sigmoid(t)
    if activation == "elu":
        return torch.where(t > 0, t, alpha * torch.expm1(t)), torch.where(t > 0, 1.0, alpha * torch.exp(t))
    phi, slope = ACTIVATIONS[activation]
    return phi(t, alpha), slope(t, alpha)


def measured(case: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> t in float64, phi and phi' (n, m), by kernels: each b alone gives the slopes of its column."""
    a = a[:, None].requires_grad_()
    b, one = b[:, None], torch.ones(1)
    activation, alpha = named(case)
    options = {"activation": activation, "slope": alpha, "backend": "native"}
    scores = additive_scores(a, b, one, **options)
    slopes = [torch.autograd.grad(additive_scores(a, bj[None], one, **options).sum(), a)[0] for bj in b]
    return a.detach().double() + b.double().T, scores.detach().double(), torch.cat(slopes, 1).double()


@each_isa
@each_smooth
@pytest.mark.parametrize("half", [4.0, 19.0, 30.0], ids=["moderate", "large", "wide"])
def test_values_and_slopes(half, activation, isa):
    grid, few = torch.linspace(-half, half, 2001), torch.linspace(-half, half, 41) + 0.0137
    with testing.instruction_set(isa):
        t, value, slope = measured(activation, grid, few)
    true_value, true_slope = exact(activation, t)
    bound = 3e-7 * true_value.abs().clamp(min=1)
    assert ((value - true_value).abs() <= bound).all()
    assert ((slope - true_slope).abs() <= 3e-7 + 6e-8).all()  # the slope itself is rounded to float32


@each_isa
@pytest.mark.parametrize("activation", KEEP_DIGITS)
def test_tiny_values_keep_their_digits(activation, isa):
    tiny = torch.logspace(-8, 0, 500)
    tiny = torch.cat([tiny, -tiny])
    with testing.instruction_set(isa):
        t, value, _ = measured(activation, tiny, torch.zeros(1))
    truth, _ = exact(activation, t)
    assert ((value - truth).abs() <= 5e-7 * truth.abs()).all()


@each_isa
@pytest.mark.parametrize("activation", KEEP_DIGITS)
def test_large_biases_cost_no_digits(activation, isa):
    # every a near 30 and every b near -30: t is small, and e^30 is not
    a, b = 30 + torch.linspace(-1, 1, 501), -30 + torch.linspace(-1, 1, 11)
    with testing.instruction_set(isa):
        t, value, slope = measured(activation, a, b)
    true_value, true_slope = exact(activation, t)
    assert ((value - true_value).abs() <= 3e-7).all() and ((slope - true_slope).abs() <= 3.6e-7).all()


@each_isa
@each_smooth
def test_shifts_have_the_same_errors(activation, isa):
    a = torch.linspace(-60, 60, 8001)[:, None].requires_grad_()
    b, one = torch.zeros(8001, 1), torch.ones(1)
    name, alpha = named(activation)
    with testing.instruction_set(isa):
        scores = additive_shifts(a, b, one, 1, first=0, activation=name, slope=alpha, backend="native")
        (slope,) = torch.autograd.grad(scores.sum(), a)
    true_value, true_slope = exact(activation, a.detach().double()[:, 0])
    assert ((scores[0].detach() - true_value).abs() <= 3e-7 * true_value.abs().clamp(min=1)).all()
    assert ((slope[:, 0] - true_slope).abs() <= 3.6e-7).all()


@each_isa
@pytest.mark.parametrize("alpha", [1e-7, 1e-6, 1e6, 1e7])
def test_elu_at_the_ends_of_its_factored_form(alpha, isa):
    """From 1e-6 to 1e6 alpha is in a factor; outside it is not."""
    a = torch.linspace(-4, 4, 401)[:, None].requires_grad_()
    b, one = torch.zeros(1, 1), torch.ones(1)
    with testing.instruction_set(isa):
        scores = additive_scores(a, b, one, activation="elu", slope=alpha, backend="native")
        (slope,) = torch.autograd.grad(scores.sum(), a)
    t = a.detach().double()
    true_value = torch.where(t > 0, t, alpha * torch.expm1(t))
    true_slope = torch.where(t > 0, 1.0, alpha * torch.exp(t))
    torch.testing.assert_close(scores.detach().double(), true_value, rtol=3e-7, atol=0)
    torch.testing.assert_close(slope.double(), true_slope, rtol=3e-7, atol=0)


@each_isa
@each_smooth
def test_far_from_zero(activation, isa):
    far = torch.tensor([1e2, 1e4, 1e10, -1e2, -1e4, -1e10])
    for a, b in ((far, torch.zeros(1)), (torch.zeros(1), far)):
        with testing.instruction_set(isa):
            t, value, slope = measured(activation, a, b)
        true_value, true_slope = exact(activation, t)
        torch.testing.assert_close(value, true_value, rtol=3e-7, atol=3e-7)
        torch.testing.assert_close(slope, true_slope, rtol=3e-7, atol=3e-7)


def test_pieces_are_as_fitted():
    check = subprocess.run([sys.executable, FIT_PIECES, "--check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr
