"""The two moments of an additive critic over all pairs; the (n, m, h) activations are never stored.

    t_ijh = a_ih + b_jh        S_ij = sum_h w_h phi(t_ijh)
    J = mean_i S_i,first_positive+i    L = log mean_(i,j) in P exp S_ij
    dL/da_ih = w_h sum_j P_ij phi'(t_ijh)    dL/db_jh the same over i    dL/dw_h = sum_ij P_ij phi(t_ijh)

with P_ij = exp(S_ij - LSE).  Because L is one number for the whole batch, the forward can collect the gradients of L
unnormalised and scale them at the end: one sweep.  The backward scales them and adds the n positives of J.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.dispatch import backends
from cibr_kernels.dispatch.library import operator
from cibr_kernels.numerics import early_dtype, sum_dtype
from cibr_kernels.primitives.additive.problem import MomentsProblem

SERVES = "an estimate with a concat critic"


def additive_moments(
    a: Tensor,  # (n, h)
    b: Tensor,  # (m, h)
    w: Tensor,  # (h,)
    bias: Tensor | None = None,  # ()
    *,
    activation: str = "relu",
    slope: float = 0.01,
    first_positive: int = 0,
    include_diagonal: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(J, L) of S_ij = bias + w . phi(a_i + b_j): float32 (float64) 0-d, differentiable in all four.  No checks.

    `slope` is leaky_relu's negative slope and elu's alpha.  Row i's positive is column first_positive + i.
    Several critics of one shape are a group: a (groups, n, h), b (groups, m, h), w (groups, h), bias (groups,) give
    J and L (groups,).
    """
    if torch.is_grad_enabled():
        needs = a.requires_grad, b.requires_grad, w.requires_grad
        if torch.float16 in (a.dtype, b.dtype, w.dtype) and any(needs):
            a, b, w = (t.to(early_dtype(t.dtype)) for t in (a, b, w))
    else:
        needs = False, False, False
    a, b, w = a.contiguous(), b.contiguous(), w.contiguous()
    j, el, *_ = additive_moments_forward(
        a, b, w, bias, activation, slope, first_positive, include_diagonal, *needs, backend
    )
    return j, el


@operator(SERVES)
def additive_moments_forward(
    a: Tensor, b: Tensor, w: Tensor, bias: Tensor | None, activation: str, slope: float, first_positive: int,
    include_diagonal: bool, need_a: bool, need_b: bool, need_w: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> J (), L () and the gradients of L: (n, h), (m, h), (h,), each empty unless needed."""
    problem = MomentsProblem(a, b, w, activation, slope, first_positive, include_diagonal, bias)
    return backends.run("additive_moments", "forward", backend, (a, b, w), problem, (need_a, need_b, need_w))


@additive_moments_forward.register_fake
def _(a, b, w, bias, activation, slope, first_positive, include_diagonal, need_a, need_b, need_w, backend):
    empty = [torch.empty_like(t) if need else t.new_empty(0) for t, need in ((a, need_a), (b, need_b), (w, need_w))]
    moment = a.new_empty(a.shape[:-2], dtype=sum_dtype(a))
    return moment, torch.empty_like(moment), *empty


@operator(SERVES)
def additive_moments_backward(
    g_j: Tensor | None, g_l: Tensor | None, a: Tensor, b: Tensor, w: Tensor, da_of_l: Tensor, db_of_l: Tensor,
    dw_of_l: Tensor, activation: str, slope: float, first_positive: int, need_a: bool, need_b: bool, need_w: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> da (n, h), db (m, h), dw (h,), each empty unless needed: the saved gradients of L and the positives of J."""
    problem = MomentsProblem(a, b, w, activation, slope, first_positive, False)
    of_l, needs = (da_of_l, db_of_l, dw_of_l), (need_a, need_b, need_w)
    return backends.run("additive_moments", "backward", backend, (a, b, w), g_j, g_l, problem, of_l, needs)


@additive_moments_backward.register_fake
def _(g_j, g_l, a, b, w, da_of_l, db_of_l, dw_of_l, activation, slope, first_positive, need_a, need_b, need_w, backend):
    return tuple(torch.empty_like(t) if need else t.new_empty(0) for t, need in ((a, need_a), (b, need_b), (w, need_w)))


def _setup(ctx, inputs, output) -> None:
    a, b, w, _, ctx.activation, ctx.slope, ctx.first_positive, _, *ctx.computed, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # zeros for each of those
    ctx.save_for_backward(a, b, w, *output[2:])


def _backward(ctx, g_j, g_l, *_):
    need_a, need_b, need_w, need_bias = ctx.needs_input_grad[:4]
    had_a, had_b, had_w = ctx.computed
    needs = need_a and had_a, need_b and had_b, need_w and had_w
    saved = ctx.saved_tensors
    if any(needs):
        grads = additive_moments_backward(
            g_j, g_l, *saved, ctx.activation, ctx.slope, ctx.first_positive, *needs, ctx.backend
        )
    else:
        grads = (None,) * 3
    dbias = None
    if need_bias:
        dbias = g_j + g_l if g_j is not None and g_l is not None else g_l if g_j is None else g_j
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), dbias, *(None,) * 8


additive_moments_forward.register_autograd(_backward, setup_context=_setup)
