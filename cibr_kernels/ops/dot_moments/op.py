"""The two moments of a separable critic over all pairs; the (n, m) scores are never stored.

    S_ij = <f_i, g_j>        J = mean_i S_i,offset+i        L = log mean_(i,j) in P exp S_ij
    df_i = gL sum_j P_ij g_j + gJ/n g_i,pos                 P_ij = exp(S_ij - LSE), dg_j the transpose

The same tiles as clip_loss with one global log-sum-exp: 1 + 3 matmul passes, O((n + m) k) memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels import backends


def dot_moments(
    f: Tensor,  # (n, k)
    g: Tensor,  # (m, k)
    *,
    offset: int = 0,
    include_diagonal: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(J, L) of S = f g^T: 0-d tensors, differentiable in f and g.  No checks."""
    return dot_moments_forward(f.contiguous(), g.contiguous(), offset, include_diagonal, backend)


@torch.library.custom_op("cibr_kernels::dot_moments_forward", mutates_args=())
def dot_moments_forward(
    f: Tensor, g: Tensor, offset: int, include_diagonal: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """-> J (), L (), float32 (float64 for float64)."""
    return backends.choose("dot_moments", backend, f, g).forward(f, g, offset, include_diagonal)


@dot_moments_forward.register_fake
def _(f, g, offset, include_diagonal, backend):
    dtype = torch.float64 if f.dtype == torch.float64 else torch.float32
    return f.new_empty((), dtype=dtype), f.new_empty((), dtype=dtype)


@torch.library.custom_op("cibr_kernels::dot_moments_backward", mutates_args=())
def dot_moments_backward(
    grad_j: Tensor, grad_l: Tensor, f: Tensor, g: Tensor, el: Tensor, offset: int, include_diagonal: bool,
    need_f: bool, need_g: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> df (n, k), dg (m, k), each empty unless needed."""
    return backends.choose("dot_moments", backend, f, g).backward(
        grad_j, grad_l, f, g, el, offset, include_diagonal, need_f, need_g
    )


@dot_moments_backward.register_fake
def _(grad_j, grad_l, f, g, el, offset, include_diagonal, need_f, need_g, backend):
    return (
        torch.empty_like(f) if need_f else f.new_empty(0),
        torch.empty_like(g) if need_g else g.new_empty(0),
    )


def _setup(ctx, inputs, output) -> None:
    f, g, ctx.offset, ctx.include_diagonal, ctx.backend = inputs
    ctx.save_for_backward(f, g, output[1])


def _backward(ctx, grad_j, grad_l):
    need_f, need_g = ctx.needs_input_grad[:2]
    df, dg = dot_moments_backward(
        grad_j, grad_l, *ctx.saved_tensors, ctx.offset, ctx.include_diagonal, need_f, need_g, ctx.backend
    )
    return df if need_f else None, dg if need_g else None, None, None, None


dot_moments_forward.register_autograd(_backward, setup_context=_setup)
