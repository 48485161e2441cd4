"""Sums of softplus over all-pairs dot products: what sigmoid losses and Jensen-Shannon are O(n) functions of.

    l_ij = scale <x_i, y_j> + bias     e_ij = softplus(l_ij), or softplus(-l_ij) for a pair of one group that attracts
    rows_i = sum_j e_ij    cols_j = sum_i e_ij, both without row i's positive, which is column first_positive + i

    total = sum_i u_i rows_i + sum_j v_j cols_j        G_ij = sigmoid(l_ij) (u_i + v_j), or -sigmoid(-l_ij) (u_i + v_j)
    dx = scale G y    dy = scale G^T x    dscale = sum_ij G_ij <x_i, y_j>    dbias = sum_ij G_ij

The weights u, v are known before the pass, so `dot_softplus` makes the gradients in it: 1 matmul pass where no gradient
is needed, else 3, without anything of n x m.  `dot_softplus_sums` gives the sums themselves, whose gradient is not
known before: 1 + 3 passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cibr_kernels import checks
from cibr_kernels.dispatch import backends
from cibr_kernels.dispatch.library import operator, or_zeros
from cibr_kernels.numerics import early_dtype
from cibr_kernels.primitives.dot.problem import SoftplusProblem

SERVES = "siglip_loss, or a js or smile estimate with a separable critic"


def dot_softplus(
    x: Tensor,  # (n, d)
    y: Tensor,  # (m, d)
    scale: Tensor,  # ()
    bias: Tensor,  # ()
    row_weights: Tensor,  # (n,)
    col_weights: Tensor | None = None,  # (m,)
    *,
    row_ids: Tensor | None = None,  # (n,) int64
    col_ids: Tensor | None = None,  # (m,) int64
    first_positive: int = 0,
    attract: bool = False,
    backend: str = "auto",
) -> Tensor:
    """-> total (), float32 (float64 for float64), differentiable in x, y, scale, bias and the weights.  No checks.

    Row i's positive, column first_positive + i (where there is one), takes no part.  Other pairs with row_ids_i =
    col_ids_j take none either, or with `attract` count as positives: softplus(-l).
    """
    grad = torch.is_grad_enabled()
    need_dx, need_dy, *rest = (grad and t.requires_grad for t in (x, y, scale, bias))
    need_dx = need_dx or (any(rest) and not need_dy)  # dscale comes from <x, dx> or <y, dy>
    return dot_softplus_total(
        x.contiguous(),
        y.contiguous(),
        scale,
        bias,
        row_weights,
        col_weights,
        row_ids,
        col_ids,
        first_positive,
        attract,
        need_dx,
        need_dy,
        backend,
    )[0]


def dot_softplus_sums(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    first_positive: int = 0,
    attract: bool = False,
    need_cols: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """-> rows (n,), cols (m,) ((0,) unless needed), differentiable in x, y, scale, bias.  Otherwise as dot_softplus."""
    return dot_softplus_forward(
        x.contiguous(), y.contiguous(), scale, bias, row_ids, col_ids, first_positive, attract, need_cols, backend
    )


def _run(
    problem: SoftplusProblem, row_weights: Tensor | None, col_weights: Tensor | None, need_cols: bool, need_dx: bool,
    need_dy: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> rows, cols, dx, dy, dscale, dbias."""
    checks.positive("logit_scale", problem.scale)
    tensors, weights = (problem.x, problem.y), (row_weights, col_weights)
    return backends.run("dot_softplus", "forward", backend, tensors, problem, *weights, need_cols, need_dx, need_dy)


@operator(SERVES)
def dot_softplus_total(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, row_weights: Tensor, col_weights: Tensor | None,
    row_ids: Tensor | None, col_ids: Tensor | None, first_positive: int, attract: bool, need_dx: bool, need_dy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> total (), rows (n,), cols (m,) or (0,), and total's gradients: dx, dy, each empty unless needed, in
    `early_dtype`, dscale (), dbias ()."""
    needs = need_dx or need_dy
    problem = SoftplusProblem(x, y, scale, row_ids, col_ids, first_positive, bias, attract)
    g_rows, g_cols = (row_weights, col_weights) if needs else (None, None)
    rows, cols, dx, dy, dscale, dbias = _run(
        problem, g_rows, g_cols, col_weights is not None, need_dx, need_dy, backend
    )
    total = (rows.double() * row_weights).sum()
    if col_weights is not None:
        total = total + (cols.double() * col_weights).sum()
    return total.to(rows.dtype), rows, cols, dx, dy, dscale, dbias


@dot_softplus_total.register_fake
def _(
    x, y, scale, bias, row_weights, col_weights, row_ids, col_ids, first_positive, attract, need_dx, need_dy, backend
):
    new, made = scale.new_empty, early_dtype(x.dtype)
    dx = x.new_empty(x.shape if need_dx else 0, dtype=made)
    dy = y.new_empty(y.shape if need_dy else 0, dtype=made)
    return new(()), new((x.shape[0],)), new((0 if col_weights is None else y.shape[0],)), dx, dy, new(()), new(())


@operator(SERVES)
def dot_softplus_scale(
    g: Tensor, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, row_weights: Tensor, col_weights: Tensor | None,
    gradients: list[Tensor], needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    """g () times each of total's gradients, in the dtype of its tensor, empty unless needed.

    It takes what they were made of, so that a second derivative is refused instead of forgotten.
    """
    return [(t * g).to(dtype) if need else t.new_empty(0) for t, dtype, need in _scaled(x, y, gradients, needed)]


def _scaled(x: Tensor, y: Tensor, gradients: list[Tensor], needed: list[bool]) -> Iterator[tuple[Any, ...]]:
    """Each of total's gradients, its dtype in the end, and whether it is needed."""
    dtypes = [x.dtype, y.dtype, *(t.dtype for t in gradients[2:])]
    return zip(gradients, dtypes, needed, strict=True)


@dot_softplus_scale.register_fake
def _(g, x, y, scale, bias, row_weights, col_weights, gradients, needed):
    return [
        torch.empty_like(t, dtype=dtype) if need else t.new_empty(0)
        for t, dtype, need in _scaled(x, y, gradients, needed)
    ]


def _setup_total(ctx, inputs, output) -> None:
    _, rows, cols, dx, dy, dscale, dbias = output
    ctx.mark_non_differentiable(rows, cols, dx, dy, dscale, dbias)
    ctx.set_materialize_grads(False)  # zeros for each of those
    ctx.save_for_backward(*inputs[:6], dx, dy, dscale, dbias, rows, cols)


def _backward_total(ctx, g, *_):
    *inputs, dx, dy, dscale, dbias, rows, cols = ctx.saved_tensors
    (g,) = or_zeros((g,), (dscale,))
    needs = list(ctx.needs_input_grad[:6])
    grads = dot_softplus_scale(g, *inputs, [dx, dy, dscale, dbias, rows, cols], needs)
    return *(t if need else None for t, need in zip(grads, needs, strict=True)), *(None,) * 7


dot_softplus_total.register_autograd(_backward_total, setup_context=_setup_total)


@operator(SERVES)
def dot_softplus_forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    first_positive: int,
    attract: bool,
    need_cols: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """-> rows (n,), cols (m,) or (0,)."""
    problem = SoftplusProblem(x, y, scale, row_ids, col_ids, first_positive, bias, attract)
    rows, cols, *_ = _run(problem, None, None, need_cols, False, False, backend)
    return rows, cols


@dot_softplus_forward.register_fake
def _(x, y, scale, bias, row_ids, col_ids, first_positive, attract, need_cols, backend):
    return scale.new_empty((x.shape[0],)), scale.new_empty((y.shape[0] if need_cols else 0,))


@operator(SERVES)
def dot_softplus_backward(
    g_rows: Tensor, g_cols: Tensor, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, row_ids: Tensor | None,
    col_ids: Tensor | None, first_positive: int, attract: bool, need_dx: bool, need_dy: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx (n, d), dy (m, d), each empty unless needed, dscale (), dbias ()."""
    col_weights = g_cols.contiguous() if g_cols.numel() else None
    problem = SoftplusProblem(x, y, scale, row_ids, col_ids, first_positive, bias, attract)
    weights = g_rows.contiguous(), col_weights
    _, _, dx, dy, dscale, dbias = _run(problem, *weights, False, need_dx, need_dy, backend)
    return dx.to(x.dtype), dy.to(y.dtype), dscale, dbias


@dot_softplus_backward.register_fake
def _(g_rows, g_cols, x, y, scale, bias, row_ids, col_ids, first_positive, attract, need_dx, need_dy, backend):
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dy = torch.empty_like(y) if need_dy else y.new_empty(0)
    return dx, dy, torch.empty_like(scale), torch.empty_like(scale)


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.first_positive, ctx.attract, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, g_rows, g_cols):
    need_x, need_y, need_scale, need_bias, *_ = ctx.needs_input_grad
    dx, dy, dscale, dbias = dot_softplus_backward(
        g_rows, g_cols, *ctx.saved_tensors, ctx.first_positive, ctx.attract, need_x or not need_y, need_y, ctx.backend
    )
    grads = ((dx, need_x), (dy, need_y), (dscale, need_scale), (dbias, need_bias))
    return *(g if need else None for g, need in grads), *(None,) * 6


dot_softplus_forward.register_autograd(_backward, setup_context=_setup)
