"""additive_moments: the kernel against float64 on every instruction set, for the eight activations."""

from __future__ import annotations

import functools

import pytest
import torch
from additive import check_group, check_moments, each_activation
from cases import ISAS, each_isa, with_gradients
from covering import each_pair

from cibr_kernels import testing
from cibr_kernels.primitives.additive.moments.op import additive_moments
from cibr_kernels.primitives.additive.moments.reference import ACTIVATIONS
from cibr_kernels.primitives.additive.moments.reference import additive_moments as reference

SHAPES = [(2, 2, 0, 1), (5, 5, 0, 31), (48, 48, 0, 64), (33, 33, 0, 100), (20, 70, 17, 65), (1, 40, 3, 16)]
BLOCKS = (150, 1400, 100, 40)  # several groups of rows and blocks of columns (32768 / h of them)


def check(shape: tuple, activation: str, isa: str, **options) -> None:
    with testing.instruction_set(isa):
        check_moments(shape, activation, "native", **options)


@each_pair(shape=SHAPES, activation=list(ACTIVATIONS), include=(False, True), isa=ISAS)
def test_kernel_matches_float64(shape, activation, include, isa):
    check(shape, activation, isa, include=include)


@each_pair(dtype=[torch.bfloat16, torch.float16], activation=list(ACTIVATIONS), isa=ISAS)
def test_half_precision_storage(dtype, activation, isa):
    check((33, 70, 9, 100), activation, isa, dtype=dtype)


@each_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_storage_in_half_precision_rounds_nothing_but_the_gradients(dtype, isa):
    # the kernel's sums are those of the same numbers in float32: equal bits, and gradients rounded once
    torch.manual_seed(5)
    a, b, w = torch.randn(40, 70).to(dtype), torch.randn(90, 70).to(dtype), torch.randn(70) / 8
    kernel = functools.partial(additive_moments, activation="leaky_relu", slope=0.1, backend="native")
    with testing.instruction_set(isa):
        j, el, da, db, dw = with_gradients(kernel, a, b, w, weights=(0, 1))
        wide = with_gradients(kernel, a.float(), b.float(), w, weights=(0, 1))
    assert torch.equal(j, wide[0]) and torch.equal(el, wide[1]) and torch.equal(dw, wide[4])
    assert torch.equal(da, wide[2].to(dtype)) and torch.equal(db, wide[3].to(dtype))


@each_isa
@each_activation
def test_large_scores_move_the_shared_exponent(activation, isa):
    check((33, 70, 9, 100), activation, isa, size=60.0)


@each_pair(shift=[30.0, -30.0], activation=list(ACTIVATIONS), isa=ISAS)
def test_large_biases_that_cancel(activation, shift, isa):
    check((20, 70, 17, 65), activation, isa, shift=shift)


@each_isa
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu", "tanh"])
def test_several_groups_and_blocks(activation, isa):
    check(BLOCKS, activation, isa)


@each_pair(weights=[(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)], activation=list(ACTIVATIONS), isa=ISAS)
def test_each_moment_alone(weights, activation, isa):
    torch.manual_seed(3)
    a, b, w = torch.randn(20, 33), torch.randn(70, 33), torch.randn(33) / 6
    kernel = functools.partial(additive_moments, activation=activation, slope=0.3, first_positive=17, backend="native")
    with testing.instruction_set(isa):
        actual = with_gradients(kernel, a, b, w, weights=weights)
    truth = with_gradients(lambda *t: reference(*t, activation, 0.3, 17), a, b, w, weights=weights, dtype=torch.float64)
    for got, t in zip(actual, truth, strict=True):
        torch.testing.assert_close(got.double(), t, rtol=1e-5, atol=1e-6)


@each_isa
def test_relu_is_flat_at_zero(isa):
    a, b, w = torch.zeros(4, 32), torch.zeros(4, 32), torch.ones(32)  # phi'(0) = 0, as in PyTorch
    with testing.instruction_set(isa):
        _, _, da, db, dw = with_gradients(additive_moments, a, b, w, weights=(1, 2))
    assert not da.any() and not db.any() and not dw.any()


@each_isa
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_weights_of_the_pairs_sum_to_one(size, isa):
    # a unit that is 1 on every pair gets dL/dw = sum P, and a and b of it w times their part of P
    torch.manual_seed(4)
    a, b, w = torch.randn(200, 64), torch.randn(1100, 64), size * torch.randn(64) / 8
    b[600:] += 3 * (w > 0)  # the largest scores come late, amid the second block of 512 columns
    a[:, 5], b[:, 5] = 1.0, 0.0
    with testing.instruction_set(isa):
        *_, da, db, dw = with_gradients(additive_moments, a, b, w, weights=(0, 1))
    assert abs(dw[5].item() - 1) < 1e-5
    for gradient in (da, db):
        assert abs(gradient[:, 5].double().sum().item() / w[5].item() - 1) < 1e-5


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_group_is_its_members(backend, dtype):
    check_group((12, 19, 3, 9), "silu", backend, dtype)
