"""The two moments of an additive critic over all pairs; the (n, m, h) activations are never stored.

    t_ijh = a_ih + b_jh        S_ij = sum_h w_h phi(t_ijh)
    J = mean_i S_i,first_positive+i    L = log mean_(i,j) in P exp S_ij
    dL/da_ih = w_h sum_j P_ij phi'(t_ijh)    dL/db_jh the same over i    dL/dw_h = sum_ij P_ij phi(t_ijh)

with P_ij = exp(S_ij - LSE).  Because L is one number for the whole batch, the forward can collect the gradients of L
unnormalised and scale them at the end: one sweep.  The backward only scales them and adds the n positives of J.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.dispatch import backends
from cibr_kernels.dispatch.library import operator, or_zeros
from cibr_kernels.numerics import early_dtype
from cibr_kernels.primitives.additive.activations import ACTIVATIONS
from cibr_kernels.primitives.additive.problem import MomentsProblem

SERVES = "an estimate with a concat critic"


def additive_moments(
    a: Tensor,  # (n, h)
    b: Tensor,  # (m, h)
    w: Tensor,  # (h,)
    *,
    activation: str = "relu",
    slope: float = 0.01,
    first_positive: int = 0,
    include_diagonal: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(J, L) of S_ij = w . phi(a_i + b_j): float32 (float64 for float64) 0-d, differentiable in a, b, w.  No checks.

    `slope` is leaky_relu's negative slope and elu's alpha.  Row i's positive is column first_positive + i.
    """
    grad = torch.is_grad_enabled()
    needs = [grad and t.requires_grad for t in (a, b, w)]
    if any(needs):
        a, b, w = (t.to(early_dtype(t.dtype)) for t in (a, b, w))
    a, b, w = a.contiguous(), b.contiguous(), w.contiguous()
    j, el, *_ = additive_moments_forward(a, b, w, activation, slope, first_positive, include_diagonal, *needs, backend)
    return j, el


def _sums(a: Tensor) -> torch.dtype:
    """The dtype of scores, sums and moments."""
    return torch.float64 if a.dtype == torch.float64 else torch.float32


@operator(SERVES)
def additive_moments_forward(
    a: Tensor, b: Tensor, w: Tensor, activation: str, slope: float, first_positive: int, include_diagonal: bool,
    need_a: bool, need_b: bool, need_w: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> J (), L () and the gradients of L: (n, h), (m, h), (h,), each empty unless needed."""
    problem = MomentsProblem(a, b, w, activation, slope, first_positive, include_diagonal)
    return backends.run("additive_moments", "forward", backend, problem.tensors, problem, (need_a, need_b, need_w))


@additive_moments_forward.register_fake
def _(a, b, w, activation, slope, first_positive, include_diagonal, need_a, need_b, need_w, backend):
    empty = [torch.empty_like(t) if need else t.new_empty(0) for t, need in ((a, need_a), (b, need_b), (w, need_w))]
    moment = a.new_empty((), dtype=_sums(a))
    return moment, torch.empty_like(moment), *empty


@operator(SERVES)
def additive_moments_backward(
    g_j: Tensor, g_l: Tensor, a: Tensor, b: Tensor, w: Tensor, da_of_l: Tensor, db_of_l: Tensor, dw_of_l: Tensor,
    activation: str, slope: float, first_positive: int, need_a: bool, need_b: bool, need_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> da (n, h), db (m, h), dw (h,), each empty unless needed: the saved gradients of L and the positives of J."""
    phi, phi_slope = ACTIVATIONS[activation]
    n = a.shape[0]
    t = a.to(_sums(a)) + b[first_positive : first_positive + n]  # (n, h), the positives
    per_row = g_j / n
    positive = phi_slope(t, slope) * (w * per_row) if need_a or need_b else a
    da = (da_of_l * g_l + positive).to(a.dtype) if need_a else a.new_empty(0)
    db = db_of_l * g_l if need_b else b.new_empty(0)
    if need_b:
        db[first_positive : first_positive + n] += positive
    dw = (dw_of_l * g_l + phi(t, slope).sum(0) * per_row).to(w.dtype) if need_w else w.new_empty(0)
    return da, db, dw


@additive_moments_backward.register_fake
def _(g_j, g_l, a, b, w, da_of_l, db_of_l, dw_of_l, activation, slope, first_positive, need_a, need_b, need_w):
    return tuple(torch.empty_like(t) if need else t.new_empty(0) for t, need in ((a, need_a), (b, need_b), (w, need_w)))


def _setup(ctx, inputs, output) -> None:
    a, b, w, ctx.activation, ctx.slope, ctx.first_positive, _, *ctx.computed, _ = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # zeros for each of those
    ctx.save_for_backward(a, b, w, *output[2:])


def _backward(ctx, g_j, g_l, *_):
    saved = ctx.saved_tensors
    moment = saved[0].new_empty((), dtype=_sums(saved[0]))
    g_j, g_l = or_zeros((g_j, g_l), (moment, moment))
    needs = [wanted and had for wanted, had in zip(ctx.needs_input_grad[:3], ctx.computed, strict=True)]
    grads = additive_moments_backward(g_j, g_l, *saved, ctx.activation, ctx.slope, ctx.first_positive, *needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 8


additive_moments_forward.register_autograd(_backward, setup_context=_setup)
