"""log_mean_exp: the kernel against float64, masks, and the moving-average gradient."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, ISAS, each_isa, leaves, with_gradients
from covering import each_pair
from torch import Tensor

import cibr_kernels as ck
from cibr_kernels import testing
from cibr_kernels.primitives.log_mean_exp.reference import log_mean_exp as reference

SHAPES = [(1,), (31,), (64, 64), (7, 13, 5), (16_384,), (40_001,)]  # a piece is 16,384 scores


@each_pair(shape=SHAPES, dtype=DTYPES, masked=(False, True), isa=ISAS)
def test_kernel_matches_float64(shape, dtype, masked, isa):
    for scale, shift in ((1.0, 0.0), (100.0, 0.0), (10.0, -300.0)):
        torch.manual_seed(1)
        scores = (scale * torch.randn(shape) + shift).to(dtype)
        mask = torch.rand(shape) < 0.3 if masked else None
        if mask is not None:
            mask.view(-1)[-1] = True

        def eager(s: Tensor, mask: Tensor | None = mask) -> Tensor:
            return reference(s, mask)

        with testing.instruction_set(isa):
            actual = with_gradients(lambda s, mask=mask: ck.log_mean_exp(s, mask=mask, backend="native"), scores)
        count = scores.numel() if mask is None else int(mask.sum())
        truth = with_gradients(eager, scores, dtype=torch.float64)
        magnitudes = abs(truth[0].item() + math.log(count)) + math.log(count), 0.0
        for name, a, e, t, magnitude in zip(
            ("L", "dscores"), actual, with_gradients(eager, scores), truth, magnitudes, strict=True
        ):
            exponent = scores.double().abs().max().item()
            testing.assert_close(name, a, e, t, terms=count, exponent=exponent, features=dtype, magnitude=magnitude)


@each_isa
def test_scores_at_the_ends_of_float32(isa):
    with testing.instruction_set(isa):
        for value in (-1e4, -100.0, 0.0, 88.0, 1e4):
            assert ck.log_mean_exp(torch.full((1000,), value)).item() == pytest.approx(value, rel=1e-6)
        some = torch.tensor([-math.inf, 3.0, -math.inf, 3.0]).requires_grad_()
        el = ck.log_mean_exp(some)
        assert el.item() == pytest.approx(3 - math.log(2))
        el.backward()
        assert some.grad is not None and some.grad.tolist() == pytest.approx([0, 0.5, 0, 0.5])


@each_isa
def test_masked_scores_are_not_looked_at(isa):
    scores = torch.tensor([1.0, math.nan, 2.0, math.inf])
    with testing.instruction_set(isa):
        el, grad = with_gradients(lambda s: ck.log_mean_exp(s, mask=torch.tensor([1, 0, 1, 0]).bool()), scores)
    assert el.item() == pytest.approx(math.log((math.e + math.e**2) / 2))
    assert grad.tolist() == pytest.approx([1 / (1 + math.e), 0, math.e / (1 + math.e), 0])


def test_moving_average_keeps_the_value_and_scales_the_gradient():
    torch.manual_seed(2)
    scores, ema = torch.randn(50), torch.tensor(0.3, requires_grad=True)
    el, grad = with_gradients(ck.log_mean_exp, scores)
    corrected, corrected_grad = with_gradients(lambda s: ck.log_mean_exp(s, ema=ema), scores)
    surrogate = with_gradients(lambda s: s.exp().mean() / math.exp(0.3), scores, dtype=torch.float64)[1]
    torch.testing.assert_close(corrected, el)
    torch.testing.assert_close(corrected_grad, grad * torch.exp(el - 0.3))
    torch.testing.assert_close(corrected_grad.double(), surrogate, rtol=1e-5, atol=1e-8)
    (s,) = leaves(scores)
    ck.log_mean_exp(s, ema=ema).backward()
    assert ema.grad is None  # the average is a constant
