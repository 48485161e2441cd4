"""log_mean_exp: the kernel against float64, masks, and the moving-average gradient."""

from __future__ import annotations

import math

import log_mean_exp
import pytest
import torch
from cases import DTYPES, ISAS, each_isa, leaves, with_gradients
from covering import each_pair

import cibr_kernels as ck
from cibr_kernels import testing

SHAPES = [(1,), (31,), (64, 64), (7, 13, 5), (16_384,), (40_001,)]  # a piece is 16,384 scores


@each_pair(shape=SHAPES, dtype=DTYPES, masked=(False, True), isa=ISAS)
def test_kernel_matches_float64(shape, dtype, masked, isa):
    torch.manual_seed(1)
    with testing.instruction_set(isa):
        for scores, mask in log_mean_exp.problems(shape, dtype, masked):
            log_mean_exp.check(lambda s, mask=mask: ck.log_mean_exp(s, mask=mask, backend="native"), scores, mask)


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
