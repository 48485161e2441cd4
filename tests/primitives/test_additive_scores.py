"""additive_scores: scores and gradients against float64 on every instruction set, for the eight activations."""

from __future__ import annotations

import functools

import pytest
import torch
from additive import check_scores, each_activation, outcome
from cases import DTYPES, ISAS, each_isa
from covering import each_pair
from torch import Tensor

from cibr_kernels import testing
from cibr_kernels.primitives.additive.moments.reference import ACTIVATIONS
from cibr_kernels.primitives.additive.scores.op import additive_scores

SHAPES = [(1, 1, 1), (5, 3, 31), (48, 64, 64), (33, 70, 100), (1, 40, 16)]
PANEL = (150, 700, 100)  # several groups of rows and blocks of columns (32768 / h of them)


def check(shape: tuple, activation: str, isa: str, dtype=torch.float32, **options) -> None:
    with testing.instruction_set(isa):
        check_scores(shape, activation, "native", dtype=dtype, scores_as=dtype, **options)


@each_pair(shape=SHAPES, dtype=DTYPES, activation=list(ACTIVATIONS), isa=ISAS)
def test_kernel_matches_float64(shape, dtype, activation, isa):
    check(shape, activation, isa, dtype=dtype)


@each_pair(shift=[30.0, -30.0], activation=list(ACTIVATIONS), isa=ISAS)
def test_large_biases_that_cancel(activation, shift, isa):
    check((20, 70, 65), activation, isa, shift=shift)


@each_isa
@each_activation
def test_several_groups_and_blocks(activation, isa):
    check(PANEL, activation, isa)


@each_pair(needs=[(0,), (1,), (2,), (0, 1), (1, 2)], activation=["relu", "leaky_relu", "silu"], isa=ISAS)
def test_gradients_that_are_asked_for_and_nothing_else(needs, activation, isa):
    torch.manual_seed(2)
    inputs, grad = (torch.randn(20, 33), torch.randn(70, 33), torch.randn(33)), torch.randn(20, 70)

    def gradients(needs: tuple[int, ...]) -> tuple[Tensor, ...]:
        tensors = [t.clone().requires_grad_(k in needs) for k, t in enumerate(inputs)]
        scores = additive_scores(*tensors, activation=activation, slope=0.3, backend="native")
        return torch.autograd.grad(scores, [tensors[k] for k in needs], grad)

    with testing.instruction_set(isa):
        every = gradients((0, 1, 2))
        for k, got in zip(needs, gradients(needs), strict=True):
            assert torch.equal(got, every[k])


@each_isa
def test_relu_is_flat_at_zero(isa):
    inputs = torch.zeros(4, 32), torch.zeros(4, 32), torch.ones(32)  # phi'(0) = 0, as in PyTorch
    with testing.instruction_set(isa):
        for t in outcome(functools.partial(additive_scores, backend="native"), inputs, torch.ones(4, 4)):
            assert not t.any()


@each_isa
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu"])
def test_the_number_of_threads_changes_no_bit(activation, isa):
    torch.manual_seed(3)
    inputs, grad = (torch.randn(300, 70), torch.randn(600, 70), torch.randn(70)), torch.randn(300, 600)
    results = []
    with testing.instruction_set(isa):
        for threads in (1, 3):
            torch.set_num_threads(threads)
            f = functools.partial(additive_scores, activation=activation, slope=0.3, backend="native")
            results.append(outcome(f, inputs, grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@each_pair(bad=[float("nan"), float("-inf")], which=range(4), activation=["relu", "leaky_relu", "tanh"], isa=ISAS)
def test_what_is_not_finite_gives_nan(bad, which, activation, isa):
    torch.manual_seed(4)
    tensors = [torch.randn(5, 9), torch.randn(7, 9), torch.randn(9), torch.randn(5, 7)]
    tensors[which].view(-1)[3] = bad
    *inputs, grad = tensors
    with testing.instruction_set(isa):
        f = functools.partial(additive_scores, activation=activation, backend="native")
        scores, *gradients = outcome(f, inputs, grad)
    assert torch.isnan(scores).all() == (which < 3)
    for t in gradients:
        assert torch.isnan(t).all()
