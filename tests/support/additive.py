"""Problems of the additive critics, and what holds a backend of theirs to the tolerance rule.

A caller chooses the backend, and around `check_*` where it runs: an instruction set of the CPU, or an emulated GPU.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from cases import leaves, with_gradients
from torch import Tensor

from cibr_kernels import testing
from cibr_kernels.primitives.additive.activations import ACTIVATIONS
from cibr_kernels.primitives.additive.moments.op import additive_moments
from cibr_kernels.primitives.additive.moments.reference import additive_moments as moments_reference
from cibr_kernels.primitives.additive.moments.reference import pair_mask
from cibr_kernels.primitives.additive.scores.op import additive_scores
from cibr_kernels.primitives.additive.scores.reference import additive_scores as scores_reference
from cibr_kernels.primitives.additive.shifts.op import additive_shifts
from cibr_kernels.primitives.additive.shifts.reference import additive_shifts as shifts_reference

WEIGHTS = (0.7, -1.3)  # of J and L in what is differentiated
SLOPES = {"leaky_relu": 0.2, "elu": 0.7}

each_activation = pytest.mark.parametrize("activation", list(ACTIVATIONS))


def inputs(n: int, m: int, h: int, size: float = 1.0, shift: float = 0.0) -> list[Tensor]:
    """a (n, h), b (m, h), w (h,): scores of standard deviation near `size`, biases near `shift` that cancel."""
    torch.manual_seed(n * 131 + m * 7 + h)
    return [torch.randn(n, h) - shift, torch.randn(m, h) + shift, size * torch.randn(h) / math.sqrt(h)]


# ---------------------------------------------------------------- additive_moments
@functools.lru_cache(maxsize=2)  # the instruction sets of one case follow one another
def expected_moments(
    shape: tuple, activation: str, size: float, shift: float, include: bool, dtype: torch.dtype = torch.float32
) -> tuple:
    """Inputs, eager PyTorch's outputs, the truth, the largest exponent, and the sizes of the terms of each output."""
    n, m, first_positive, h = shape
    a, b, w = (t.to(dtype) for t in inputs(n, m, h, size, shift))
    slope = SLOPES.get(activation, 0.0)

    def moments(a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return moments_reference(a, b, w, activation, slope, first_positive, include)

    eager = with_gradients(moments, a, b, w, weights=WEIGHTS)
    truth = with_gradients(moments, a, b, w, weights=WEIGHTS, dtype=torch.float64)
    phi = ACTIVATIONS[activation][0]
    values = phi(a.double()[:, None] + b.double()[None], slope)  # (n, m, h)
    terms = (values * w.double()).abs().sum(-1)  # (n, m): of S
    p = (values @ w.double()).masked_fill(~pair_mask(n, m, first_positive, include, a.device), -math.inf)
    p = p.flatten().softmax(0).view(n, m)
    dw_terms = WEIGHTS[0] * values.diagonal(first_positive)[:, :n].abs().mean(1) - WEIGHTS[1] * torch.einsum(
        "ij,ijh->h", p, values.abs()
    )
    log_pairs = math.log(n * m - (0 if include else n))
    magnitudes = [
        terms.diagonal(first_positive)[:n].mean().item(),
        abs(truth[1].item() + log_pairs) + log_pairs,  # L = LSE - log |P|
        0.0,
        0.0,
        dw_terms.max().item(),
    ]
    return (a, b, w), eager, truth, terms.max().item(), magnitudes


def check_moments(
    shape: tuple,
    activation: str,
    backend: str,
    *,
    size: float = 1.0,
    shift: float = 0.0,
    include: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Holds J, L and the gradients to the rule; shape: n, m, first_positive, h."""
    tensors, eager, truth, exponent, magnitudes = expected_moments(shape, activation, size, shift, include, dtype)
    n, m, first_positive, h = shape
    kernel = functools.partial(
        additive_moments,
        activation=activation,
        slope=SLOPES.get(activation, 0.0),
        first_positive=first_positive,
        include_diagonal=include,
        backend=backend,
    )
    actual = with_gradients(kernel, *tensors, weights=WEIGHTS)
    names = ("J", "L", "da", "db", "dw")
    for name, a, e, t, magnitude in zip(names, actual, eager, truth, magnitudes, strict=True):
        testing.assert_close(name, a, e, t, terms=n + m + h, exponent=exponent, features=dtype, magnitude=magnitude)


def check_group(shape: tuple, activation: str, backend: str, dtype: torch.dtype = torch.float32) -> None:
    """Three critics with biases as one problem: each has its own J, L and gradients, and its own NaN."""
    n, m, first_positive, h = shape
    members = [
        [t.to(dtype) for t in inputs(n, m, h, size, seed)] for seed, size in ((0.0, 1.0), (0.5, 9.0), (0.1, 1.0))
    ]
    members[2][0][1, 2] = math.nan
    tensors = [torch.stack(t) for t in zip(*members, strict=True)]
    bias, weights = torch.tensor([0.3, -2.0, 1.0]), torch.tensor([[0.7, -0.4, 1.0], [-1.3, 0.2, 1.0]])
    options = {"activation": activation, "slope": SLOPES.get(activation, 0.0), "first_positive": first_positive}
    own = leaves(*tensors, bias)
    j, el = additive_moments(*own, **options, backend=backend)
    gradients = torch.autograd.grad((j, el), own, tuple(weights))
    for k in range(2):
        wide = leaves(*members[k], bias[k], dtype=torch.float64)
        expected = [t + wide[3] for t in moments_reference(*wide[:3], activation, options["slope"], first_positive)]
        truth = torch.autograd.grad(expected, wide, tuple(weights[:, k].double()))
        close = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {"rtol": 1e-4, "atol": 2e-5}
        for found, wanted in zip((j, el, *gradients), (*expected, *truth), strict=True):
            torch.testing.assert_close(found[k].double(), wanted, **close)
    assert all(t[2].isnan().all() for t in (j, el, *gradients[:3]))


# ---------------------------------------------------------------- additive_scores and additive_shifts
def outcome(f, tensors: list[Tensor], grad: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Scores, then the gradients of their sum weighted with `grad`."""
    own = leaves(*tensors, dtype=dtype)
    scores = f(*own)
    return [scores.detach(), *torch.autograd.grad(scores, own, grad.to(scores.dtype))]


@functools.lru_cache(maxsize=2)
def expected_scores(shape: tuple[int, ...], activation: str, size: float, shift: float, dtype: torch.dtype) -> tuple:
    """Inputs, a gradient of both signs, eager PyTorch's outputs, the truth, and the sizes of the terms of each."""
    n, m, _ = shape
    tensors = [t.to(dtype) for t in inputs(*shape, size, shift)]
    grad, slope = torch.randn(n, m), SLOPES.get(activation, 0.0)

    def scores(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        return scores_reference(a, b, w, activation, slope)

    eager, truth = outcome(scores, tensors, grad), outcome(scores, tensors, grad, torch.float64)
    a, b, w = (t.double() for t in tensors)
    phi, phi_slope = (f(a[:, None] + b[None], slope).abs() for f in ACTIVATIONS[activation])  # (n, m, h)
    g = grad.double().abs()
    magnitudes = [  # sums of absolute terms: signs cancel
        (phi @ w.abs()).max().item(),
        (torch.einsum("ij,ijh->ih", g, phi_slope) * w.abs()).max().item(),
        (torch.einsum("ij,ijh->jh", g, phi_slope) * w.abs()).max().item(),
        torch.einsum("ij,ijh->h", g, phi).max().item(),
    ]
    return tensors, grad, eager, truth, magnitudes


def check_scores(
    shape: tuple,
    activation: str,
    backend: str,
    *,
    size: float = 1.0,
    shift: float = 0.0,
    dtype: torch.dtype = torch.float32,
    scores_as: torch.dtype = torch.float32,
) -> None:
    """Holds the scores, by the rule of features of `scores_as`, and the gradients to the rule; shape: n, m, h."""
    tensors, grad, eager, truth, magnitudes = expected_scores(shape, activation, size, shift, dtype)
    slope = SLOPES.get(activation, 0.0)
    kernel = functools.partial(additive_scores, activation=activation, slope=slope, backend=backend)
    actual = outcome(kernel, tensors, grad)
    for name, a, e, t, magnitude in zip(("S", "da", "db", "dw"), actual, eager, truth, magnitudes, strict=True):
        features = scores_as if name == "S" else dtype
        testing.assert_close(name, a, e, t, terms=sum(shape), exponent=0.0, features=features, magnitude=magnitude)


def check_shifts(
    case: tuple, activation: str, backend: str, size: float = 1.0, dtype: torch.dtype = torch.float32
) -> None:
    """Holds scores and gradients of a weighted sum of them to the rule; case: n, m, h, first, k."""
    n, m, h, first, k = case
    tensors = [t.to(dtype) for t in inputs(n, m, h, size)]
    slope, grad = SLOPES.get(activation, 0.0), torch.randn(k, n)

    def scores(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        return shifts_reference(a, b, w, k, first, activation, slope)

    kernel = functools.partial(additive_shifts, k=k, first=first, activation=activation, slope=slope, backend=backend)
    actual = outcome(kernel, tensors, grad)
    eager, truth = outcome(scores, tensors, grad), outcome(scores, tensors, grad, torch.float64)
    a, b, w = (t.double() for t in tensors)
    t = a + b[(torch.arange(n) + first + torch.arange(k)[:, None]) % m]
    phi, slopes = (f(t, slope).abs() for f in ACTIVATIONS[activation])
    per_pair = slopes * w.abs() * grad[..., None].abs()
    magnitudes = [
        (phi * w.abs()).sum(-1).max().item(),
        per_pair.sum(0).max().item(),
        per_pair.sum((0, 1)).max().item() / n,
        (phi * grad[..., None].abs()).sum((0, 1)).max().item(),
    ]
    for name, x, e, true, magnitude in zip(("S", "da", "db", "dw"), actual, eager, truth, magnitudes, strict=True):
        testing.assert_close(name, x, e, true, terms=n + k + h, exponent=1.0, features=dtype, magnitude=magnitude)
