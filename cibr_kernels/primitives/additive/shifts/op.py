"""Scores of an additive critic on k cyclic shifts of the batch, in O(k n) memory: no (k, n, h) activations.

    scores_ri = sum_h w_h phi(a_ih + b_jh)    j = (i + first + r) mod m,  r = 0 ... k - 1

    da_ih = w_h sum_r g_ri phi'(t_ijh)    db_jh the same over the (r, i) that meet j    dw_h = sum_ri g_ri phi(t_ijh)

Every row of a gradient is a sum over the shifts, in their order, by the one program that owns the row.
"""

from __future__ import annotations

from torch import Tensor

from cibr_kernels.dispatch import backends
from cibr_kernels.dispatch.library import operator
from cibr_kernels.numerics import sum_dtype
from cibr_kernels.primitives.additive.gradients import differentiable
from cibr_kernels.primitives.additive.problem import ShiftsProblem

SERVES = "an estimate with a concat critic and k partners"


def additive_shifts(
    a: Tensor,  # (n, h)
    b: Tensor,  # (m, h)
    w: Tensor,  # (h,)
    k: int,
    *,
    first: int = 1,
    activation: str = "relu",
    slope: float = 0.01,
    backend: str = "auto",
) -> Tensor:
    """(k, n) scores of row i of a with row (i + first + r) mod m of b, n <= m, differentiable in a, b, w.  No checks.

    float32 (float64 for float64).  `first` 0 makes row 0 the positives.  `slope` is leaky_relu's negative slope and
    elu's alpha.
    """
    return additive_shifts_forward(a.contiguous(), b.contiguous(), w.contiguous(), first, k, activation, slope, backend)


@operator(SERVES)
def additive_shifts_forward(
    a: Tensor, b: Tensor, w: Tensor, first: int, k: int, activation: str, slope: float, backend: str
) -> Tensor:
    """-> scores (k, n)."""
    problem = ShiftsProblem(a, b, w, activation, slope, first, k)
    return backends.run("additive_shifts", "forward", backend, problem.tensors, problem)


@additive_shifts_forward.register_fake
def _(a, b, w, first, k, activation, slope, backend):
    return a.new_empty((k, a.shape[0]), dtype=sum_dtype(a))


@operator(SERVES)
def additive_shifts_backward(
    grad: Tensor, a: Tensor, b: Tensor, w: Tensor, first: int, k: int, activation: str, slope: float,
    need_a: bool, need_b: bool, need_w: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """grad (k, n) -> da (n, h), db (m, h), dw (h,) as their inputs, each empty unless needed."""
    problem = ShiftsProblem(a, b, w, activation, slope, first, k)
    needs = need_a, need_b, need_w
    return backends.run("additive_shifts", "backward", backend, problem.tensors, grad, problem, needs)


differentiable(additive_shifts_forward, additive_shifts_backward)
