"""log_mean_exp in Triton, compiled for each GPU and executed without one, against float64."""

from __future__ import annotations

import math

import log_mean_exp
import pytest
import torch
from cases import DTYPES, with_gradients
from executor import emulated
from torch import Tensor

import cibr_kernels as ck
from cibr_kernels.primitives.log_mean_exp import triton as backend
from cibr_kernels.primitives.log_mean_exp.reference import log_mean_exp as reference

SHAPES = [(1,), (7, 13, 5), (64, 64), (4097,), (3, 5000)]  # a piece is 4096 scores
CASES = [
    (capability, dtype, shape, masked)
    for i, (capability, dtype) in enumerate((c, d) for c in (80, 90, 100, 120) for d in DTYPES)
    for j, shape in enumerate(SHAPES)
    for masked in ((False, True) if capability == 90 else ((i + j) % 2 == 0,))
]


def check(capability: int, scores: Tensor, mask: Tensor | None) -> None:
    with emulated(capability) as gpu:
        log_mean_exp.check(lambda s: ck.log_mean_exp(s, mask=mask, backend="triton"), scores, mask)
    assert [name for name, _ in gpu.launches] == [
        f"log_mean_exp_{step}_kernel" for step in ("pieces", "merge", "backward")
    ]


@pytest.mark.parametrize(("capability", "dtype", "shape", "masked"), CASES, ids=str)
def test_matches_float64(capability, dtype, shape, masked):
    for scores, mask in log_mean_exp.problems(shape, dtype, masked):
        check(capability, scores, mask)


def test_more_pieces_than_one_block_of_the_merge(monkeypatch):
    monkeypatch.setattr(backend, "PIECE", 128)
    monkeypatch.setattr(backend, "BLOCK", 32)
    check(90, 30 * torch.randn(41, 333), torch.rand(41, 333) < 0.3)


def run(scores: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    with emulated(90):
        return with_gradients(lambda s: ck.log_mean_exp(s, mask=mask, backend="triton"), scores)


def test_infinities_are_the_references():
    for numbers in (
        [-math.inf, 3.0, -math.inf, 3.0],
        [math.inf, 0.0],
        [-math.inf, -math.inf],
        [-1e4] * 5000,
        [1e4] * 5,
    ):
        scores = torch.tensor(numbers)
        actual, expected = run(scores), with_gradients(reference, scores)
        torch.testing.assert_close(actual[0], expected[0], equal_nan=True)
    el, grad = run(torch.tensor([-math.inf, 3.0, -math.inf, 3.0]))
    assert el.item() == pytest.approx(3 - math.log(2)) and grad.tolist() == pytest.approx([0, 0.5, 0, 0.5])


@pytest.mark.parametrize("where", [0, 4099, 4999])
def test_one_nan_reaches_everything(where):
    scores = torch.randn(5000)
    scores[where] = math.nan
    el, grad = run(scores)
    assert el.isnan() and grad.isnan().all()


def test_masked_scores_are_not_looked_at():
    scores = torch.tensor([1.0, math.nan, 2.0, math.inf])
    el, grad = run(scores, torch.tensor([1, 0, 1, 0]).bool())
    assert el.item() == pytest.approx(math.log((math.e + math.e**2) / 2))
    assert grad.tolist() == pytest.approx([1 / (1 + math.e), 0, math.e / (1 + math.e), 0])


def test_the_mean_of_nothing_is_nan():
    with emulated(90):
        assert backend.forward(torch.randn(3), torch.zeros(3, dtype=torch.bool)).isnan()
