"""dot_softplus in plain PyTorch: the specification.  It promotes instead of casting, so float64 in is the oracle.

l_ij = scale <x_i, y_j> + bias     e_ij = softplus(l_ij), or softplus(-l_ij) for a pair of one group that attracts
rows_i = sum_j e_ij    cols_j = sum_i e_ij    both without row i's positive, which is column first_positive + i
"""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.numerics import early_dtype, promote
from cibr_kernels.primitives.dot.lse.reference import is_positive
from cibr_kernels.primitives.dot.problem import SoftplusProblem


def dot_softplus(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, row_ids: Tensor | None = None, col_ids: Tensor | None = None,
    first_positive: int = 0, attract: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (n, d), y (m, d), scale (), bias () -> rows (n,), cols (m,), differentiable in all four.

    Other pairs with row_ids_i = col_ids_j are left out, or with `attract` counted as positives: softplus(-l).
    """
    logits = scale * (promote(x) @ promote(y).T) + bias  # (n, m)
    sign, kept = _signs(len(x), len(y), row_ids, col_ids, first_positive, attract, logits)
    e = torch.logaddexp(sign * logits, torch.zeros_like(logits)) * kept
    return e.sum(1), e.sum(0)


def _signs(
    n: int, m: int, row_ids: Tensor | None, col_ids: Tensor | None, first_positive: int, attract: bool, like: Tensor
) -> tuple[Tensor, Tensor]:
    """(n, m) of +1 and -1, the sign of l in softplus, and of 0 and 1, whether the pair counts."""
    kept = ~is_positive(n, m, first_positive, like.device)
    sign = torch.ones_like(like)
    if row_ids is not None and col_ids is not None:
        same = row_ids[:, None] == col_ids
        if attract:
            sign = torch.where(same, -sign, sign)
        else:
            kept = kept & ~same
    return sign, kept.to(like.dtype)


def forward(
    problem: SoftplusProblem, row_weights: Tensor | None, col_weights: Tensor | None, need_cols: bool, need_dx: bool,
    need_dy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> rows (n,), cols (m,) or (0,), dx (n, d), dy (m, d), each empty unless needed, dscale (), dbias ().

    The gradients are those of sum_i row_weights_i rows_i + sum_j col_weights_j cols_j; without col_weights, of the
    first sum; without either, there are none: dscale and dbias are 0.  dx and dy are float32 for float16.
    """
    x, y, scale, bias = problem.x, problem.y, problem.scale, problem.bias
    pairs = problem.row_ids, problem.col_ids, problem.first_positive, problem.attract
    rows, cols = dot_softplus(x, y, scale, bias, *pairs)
    cols = cols if need_cols else cols[:0].clone()
    made = early_dtype(x.dtype)
    dx, dy = x.new_empty(0, dtype=made), y.new_empty(0, dtype=made)
    zero = torch.zeros_like(scale)
    if row_weights is None:
        return rows, cols, dx, dy, zero, zero.clone()
    cosines = promote(x) @ promote(y).T
    sign, kept = _signs(len(x), len(y), *pairs, cosines)
    weights = row_weights[:, None] if col_weights is None else row_weights[:, None] + col_weights
    g = sign * kept * (sign * (scale * cosines + bias)).sigmoid() * weights
    if need_dx:
        dx = (scale * (g @ promote(y))).to(made)
    if need_dy:
        dy = (scale * (g.T @ promote(x))).to(made)
    return rows, cols, dx, dy, (g * cosines).sum().to(scale.dtype), g.sum().to(scale.dtype)
