"""additive_shifts against its definition row by row, its registered operators, and every backend that runs here."""

from __future__ import annotations

import math

import pytest
import torch
from additive import check_shifts as check
from additive import each_activation, inputs
from cases import ISAS, each_isa, with_gradients
from covering import each_pair
from torch import Tensor
from torch.library import opcheck

from cibr_kernels import testing
from cibr_kernels.dispatch import backends
from cibr_kernels.primitives.additive.moments.reference import ACTIVATIONS
from cibr_kernels.primitives.additive.shifts.op import additive_shifts
from cibr_kernels.primitives.additive.shifts.reference import additive_shifts as reference

OPS = torch.ops.cibr_kernels
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
CASES = [  # n, m, h, first, k
    (2, 2, 1, 1, 1),
    (5, 5, 31, 1, 4),
    (37, 37, 40, 0, 7),
    (20, 27, 65, 0, 8),
    (33, 33, 130, 30, 6),
    (1, 4, 16, 1, 3),
]
KERNEL_CASES = [*CASES, (40, 43, 100, 2, 9), (5, 9, 23, 17, 25), (3, 3, 64, -7, 12)]  # the last two wrap often


def test_definition():
    a, b, w = inputs(7, 9, 5)
    scores = additive_shifts(a, b, w, 4, first=6, activation="gelu", backend="reference")
    for r in range(4):
        for i in range(7):
            expected = torch.nn.functional.gelu(a[i] + b[(i + 6 + r) % 9]) @ w
            torch.testing.assert_close(scores[r, i], expected)


@each_activation
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


@each_pair(case=KERNEL_CASES, activation=list(ACTIVATIONS), isa=ISAS)
def test_kernel_matches_float64(case, activation, isa):
    with testing.instruction_set(isa):
        check(case, activation, "native")


@each_pair(dtype=[torch.bfloat16, torch.float16], activation=list(ACTIVATIONS), isa=ISAS)
def test_kernel_in_half_precision(dtype, activation, isa):
    with testing.instruction_set(isa):
        check((40, 43, 100, 2, 9), activation, "native", dtype=dtype)


@each_isa
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_kernel_with_more_rows_than_blocks(activation, isa):
    with testing.instruction_set(isa):
        check((5000, 5003, 20, 4990, 7), activation, "native", size=100.0)


def values(tensors: list[Tensor], grad: Tensor, *, first: int = 1, needs=(0, 1, 2), **options) -> list[Tensor]:
    """The kernel's scores and the gradients that are needed."""
    own = [t.clone().requires_grad_(k in needs) for k, t in enumerate(tensors)]
    scores = additive_shifts(*own, grad.shape[0], first=first, backend="native", **options)
    return [scores.detach(), *torch.autograd.grad(scores, [own[k] for k in needs], grad)]


@each_pair(needs=[(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)], activation=["relu", "leaky_relu", "silu"], isa=ISAS)
def test_gradients_that_are_asked_for_and_nothing_else(needs, activation, isa):
    tensors, grad = inputs(20, 27, 33), torch.randn(5, 20)
    options = {"activation": activation, "slope": 0.3}
    with testing.instruction_set(isa):
        scores, *every = values(tensors, grad, **options)
        same, *some = values(tensors, grad, needs=needs, **options)
    assert torch.equal(same, scores)
    for k, gradient in zip(needs, some, strict=True):
        torch.testing.assert_close(gradient, every[k], rtol=1e-6, atol=1e-6)  # compiled apart: fused otherwise


@each_isa
@each_activation
def test_the_number_of_threads_changes_no_bit(activation, isa):
    tensors, grad = inputs(500, 600, 200), torch.randn(70, 500)  # work for three threads
    results = []
    with testing.instruction_set(isa):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(values(tensors, grad, activation=activation, slope=0.3))
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)


@each_pair(bad=[math.nan, math.inf, -math.inf], which=range(4), activation=list(ACTIVATIONS), isa=ISAS)
def test_what_is_not_finite_reaches_what_it_enters_and_nothing_else(bad, which, activation, isa):
    n, m, k = 6, 9, 2
    tensors = [*inputs(n, m, 21), torch.randn(k, n)]
    tensors[which].view(-1)[4 if which == 3 else 21 * 3 % tensors[which].numel()] = bad  # row 3, or row 4 of shift 0
    with testing.instruction_set(isa):
        results = values(tensors[:3], tensors[3], activation=activation, slope=0.3)
    scores, da, db, dw = (t.isnan() for t in results)
    row, met = torch.arange(n), (torch.arange(n) + torch.arange(1, 1 + k)[:, None]) % m
    if which == 2:  # dw does not depend on w
        assert not results[0].isfinite().any() and not dw.any()
        assert not results[1][:, 0].isfinite().any() and not da[:, 1:].any()
        assert not results[2][met.unique(), 0].isfinite().any() and not db[:, 1:].any()
        return
    pairs = [(row == 3).expand(k, n), met == 3, None, (row == 4) & (torch.arange(k)[:, None] == 0)][which]
    of_b = torch.zeros(m, dtype=torch.bool).index_put((met[pairs],), torch.tensor(True))
    assert torch.equal(scores, pairs if which < 2 else torch.zeros_like(pairs))
    assert torch.equal(da, pairs.any(0)[:, None].expand_as(da))
    assert torch.equal(db, of_b[:, None].expand_as(db))
    assert dw.all()


@each_isa
def test_a_row_of_b_that_meets_nothing_has_no_gradient(isa):
    a, b, w = inputs(2, 9, 21)
    b[7], grad = math.nan, torch.randn(3, 2)  # rows 1 ... 4 are met
    with testing.instruction_set(isa):
        scores, da, db, dw = values([a, b, w], grad)
    assert all(t.isfinite().all() for t in (scores, da, dw))
    assert torch.equal(db.count_nonzero(1) > 0, (torch.arange(9) >= 1) & (torch.arange(9) < 5))


@each_isa
def test_relu_is_flat_at_zero(isa):
    tensors = [torch.zeros(4, 32), torch.zeros(4, 32), torch.ones(32)]  # phi'(0) = 0, as in PyTorch
    with testing.instruction_set(isa):
        assert not any(t.any() for t in values(tensors, torch.ones(2, 4)))


@each_isa
def test_the_cpu_takes_the_kernel(isa):
    tensors = inputs(3, 3, 2)
    for dtype, name in ((torch.float32, "native"), (torch.float16, "native"), (torch.float64, "reference")):
        module = backends.choose("additive_shifts", "auto", *(t.to(dtype) for t in tensors))
        assert module.__name__.endswith(name)
