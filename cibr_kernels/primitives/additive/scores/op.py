"""Scores of an additive critic on n x m pairs, without the (n, m, h) activations: for a panel of rows at a time.

    S_ij = sum_h w_h phi(a_ih + b_jh)
    da_ih = w_h sum_j g_ij phi'(t_ijh)    db_jh the same over i    dw_h = sum_ij g_ij phi(t_ijh)

The op's result is n x m: losses that are more than a log-mean-exp (InfoNCE, Jensen-Shannon, SMILE) call it for as many
rows as fit their budget and let go of the scores.
"""

from __future__ import annotations

from torch import Tensor

from cibr_kernels.dispatch import backends
from cibr_kernels.dispatch.library import operator
from cibr_kernels.numerics import sum_dtype
from cibr_kernels.primitives.additive.gradients import differentiable
from cibr_kernels.primitives.additive.problem import AdditiveProblem

SERVES = "an estimate with a concat critic"


def additive_scores(
    a: Tensor,  # (n, h)
    b: Tensor,  # (m, h)
    w: Tensor,  # (h,)
    *,
    activation: str = "relu",
    slope: float = 0.01,
    backend: str = "auto",
) -> Tensor:
    """(n, m) scores of every row of a with every row of b, float32 (float64 for float64), differentiable.  No checks.

    `slope` is leaky_relu's negative slope and elu's alpha.
    """
    return additive_scores_forward(a.contiguous(), b.contiguous(), w.contiguous(), activation, slope, backend)


@operator(SERVES)
def additive_scores_forward(a: Tensor, b: Tensor, w: Tensor, activation: str, slope: float, backend: str) -> Tensor:
    """-> scores (n, m)."""
    problem = AdditiveProblem(a, b, w, activation, slope)
    return backends.run("additive_scores", "forward", backend, problem.tensors, problem)


@additive_scores_forward.register_fake
def _(a, b, w, activation, slope, backend):
    return a.new_empty((a.shape[0], b.shape[0]), dtype=sum_dtype(a))


@operator(SERVES)
def additive_scores_backward(
    grad: Tensor, a: Tensor, b: Tensor, w: Tensor, activation: str, slope: float, need_a: bool, need_b: bool,
    need_w: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """grad (n, m) -> da (n, h), db (m, h), dw (h,) as their inputs, each empty unless needed."""
    problem = AdditiveProblem(a, b, w, activation, slope)
    needs = need_a, need_b, need_w
    return backends.run("additive_scores", "backward", backend, problem.tensors, grad, problem, needs)


differentiable(additive_scores_forward, additive_scores_backward)
