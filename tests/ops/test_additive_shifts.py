"""additive_shifts against its definition row by row, its registered operators, and every backend that runs here."""

from __future__ import annotations

import math

import pytest
import torch
from cases import leaves, with_gradients
from torch import Tensor
from torch.library import opcheck

from cibr_kernels import testing
from cibr_kernels.ops.additive_moments.reference import ACTIVATIONS
from cibr_kernels.ops.additive_shifts.op import additive_shifts
from cibr_kernels.ops.additive_shifts.reference import additive_shifts as reference

OPS = torch.ops.cibr_kernels
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
SLOPES = {"leaky_relu": 0.2, "elu": 0.7}
CASES = [  # n, m, h, first, k
    (2, 2, 1, 1, 1), (5, 5, 31, 1, 4), (37, 37, 40, 0, 7), (20, 27, 65, 0, 8), (33, 33, 130, 30, 6), (1, 4, 16, 1, 3),
]  # fmt: skip


def inputs(n: int, m: int, h: int, size: float = 1.0) -> list[Tensor]:
    torch.manual_seed(n * 131 + m * 7 + h)
    return [torch.randn(n, h), torch.randn(m, h), size * torch.randn(h) / math.sqrt(h)]


def check(case: tuple, activation: str, backend: str, size: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
    """Scores and gradients of a weighted sum of them, against float64."""
    n, m, h, first, k = case
    a, b, w = (t.to(dtype) for t in inputs(n, m, h, size))
    slope, weights = SLOPES.get(activation, 0.0), torch.randn(k, n)

    def outcome(scores: Tensor) -> tuple[Tensor, Tensor]:
        return scores, (scores * weights).sum()

    def values(f, *tensors: Tensor, wide: torch.dtype | None = None) -> list[Tensor]:
        own = leaves(*tensors, dtype=wide)
        scores, total = outcome(f(*own))
        return [scores.detach(), *torch.autograd.grad(total, own)]

    actual = values(
        lambda *t: additive_shifts(*t, k, first=first, activation=activation, slope=slope, backend=backend), a, b, w
    )
    eager = values(lambda *t: reference(*t, k, first, activation, slope), a, b, w)
    truth = values(lambda *t: reference(*t, k, first, activation, slope), a, b, w, wide=torch.float64)
    t = a.double() + b.double()[(torch.arange(n) + first + torch.arange(k)[:, None]) % m]
    phi, slopes = (f(t, slope).abs() for f in ACTIVATIONS[activation])
    exponent = (phi * w.double().abs()).sum(-1).max().item()
    per_pair = slopes * w.double().abs() * weights[..., None].abs()
    magnitudes = [exponent, per_pair.sum(0).max().item(), per_pair.sum((0, 1)).max().item() / n,
                  (phi * weights[..., None].abs()).sum((0, 1)).max().item()]  # fmt: skip
    for name, x, e, true, magnitude in zip(("scores", "da", "db", "dw"), actual, eager, truth, magnitudes, strict=True):
        testing.assert_close(name, x, e, true, terms=n + k + h, exponent=1.0, features=dtype, magnitude=magnitude)


def test_definition():
    a, b, w = inputs(7, 9, 5)
    scores = additive_shifts(a, b, w, 4, first=6, activation="gelu", backend="reference")
    for r in range(4):
        for i in range(7):
            expected = torch.nn.functional.gelu(a[i] + b[(i + 6 + r) % 9]) @ w
            torch.testing.assert_close(scores[r, i], expected)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_is_the_gradient_of_the_reference(case, activation):
    check(case, activation, "reference")


def test_half_precision_is_computed_in_float32():
    a, b, w = (t.bfloat16() for t in inputs(9, 9, 12))
    scores = additive_shifts(a, b, w, 3, backend="reference")
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reference(a.float(), b.float(), w.float(), 3))
    gradients = with_gradients(lambda *t: additive_shifts(*t, 3, backend="reference").sum(), a, b, w)
    assert all(g.dtype == torch.bfloat16 for g in gradients[1:])


@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_operators(needs):
    tensors = [t.requires_grad_(need) for t, need in zip(inputs(5, 6, 3), needs, strict=True)]
    opcheck(OPS.additive_shifts_forward, (*tensors, 1, 4, "gelu", 0.0, "reference"), test_utils=CHECKS)
    detached = [t.detach() for t in tensors]
    arguments = torch.randn(4, 5), *detached, 1, 4, "gelu", 0.0, *needs, "reference"
    opcheck(OPS.additive_shifts_backward, arguments, test_utils=CHECKS)


def test_gradcheck():
    tensors = [t.double().requires_grad_() for t in inputs(4, 6, 3)]
    torch.autograd.gradcheck(
        lambda *t: additive_shifts(*t, 3, first=2, activation="tanh", backend="reference"), tensors
    )


def test_nan_reaches_the_scores_it_takes_part_in():
    a, b, w = inputs(6, 6, 4)
    b[2, 1] = math.nan
    scores = additive_shifts(a, b, w, 2)
    i = torch.arange(6)
    assert torch.equal(scores.isnan(), torch.stack([(i + s) % 6 == 2 for s in (1, 2)]))
