"""Scores of an additive critic on k cyclic shifts of the batch, in O(k n) memory: no (k, n, h) activations.

    scores_ri = sum_h w_h phi(a_ih + b_jh)    j = (i + first + r) mod m,  r = 0 ... k - 1

    da_ih = w_h sum_r g_ri phi'(t_ijh)    db_jh the same over the (r, i) that meet j    dw_h = sum_ri g_ri phi(t_ijh)

Every row of a gradient is a sum over the shifts, in their order, by the one program that owns the row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.dispatch import backends
from cibr_kernels.dispatch.library import operator
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
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    return a.new_empty((k, a.shape[0]), dtype=dtype)


@operator(SERVES)
def additive_shifts_backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    w: Tensor,
    first: int,
    k: int,
    activation: str,
    slope: float,
    need_a: bool,
    need_b: bool,
    need_w: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (k, n) -> da (n, h), db (m, h), dw (h,) as their inputs, each empty unless needed."""
    problem = ShiftsProblem(a, b, w, activation, slope, first, k)
    needs = need_a, need_b, need_w
    return backends.run("additive_shifts", "backward", backend, problem.tensors, grad, problem, needs)


@additive_shifts_backward.register_fake
def _(grad, a, b, w, first, k, activation, slope, need_a, need_b, need_w, backend):
    return tuple(torch.empty_like(t) if need else t.new_empty(0) for t, need in ((a, need_a), (b, need_b), (w, need_w)))


def _setup(ctx, inputs, output) -> None:
    a, b, w, *ctx.options, ctx.backend = inputs
    ctx.save_for_backward(a, b, w)


def _backward(ctx, grad):
    needs = ctx.needs_input_grad[:3]
    grads = additive_shifts_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options, *needs, ctx.backend)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 5


additive_shifts_forward.register_autograd(_backward, setup_context=_setup)
