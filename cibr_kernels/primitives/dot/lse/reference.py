"""dot_lse in plain PyTorch: the specification.  It promotes instead of casting, so float64 in is the oracle.

l_ij = scale <x_i, y_j>        row i's positive is column first_positive + i
rows_i = log sum_j exp l_ij    cols_j = log sum_i exp l_ij    positives_i = l_i,first_positive+i
"""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.numerics import logsumexp, promote
from cibr_kernels.primitives.dot.problem import LseGradients, LseProblem, LseSums

NONE = float("-inf")


def dot_lse(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    first_positive: int = 0,
    mask_positives: bool = True,
    row_limits: Tensor | None = None,
    need_cols: bool = True,
    need_max: bool = False,
) -> tuple[Tensor, ...]:
    """x (n, d), y (m, d), scale () -> rows (n,), cols (m,) or (0,), positives (n,), differentiable in all three.

    With `mask_positives` they take no part in the sums, nor do pairs with row_ids_i = col_ids_j or with
    l_ij > row_limits_i; the sum of nothing is -inf.  `need_max`: also the largest logit of each sum, (n,) and (m,) or
    (0,).
    """
    logits = scale * (promote(x) @ promote(y).T)  # (n, m)
    positives = logits.diagonal(first_positive)[: len(x)]
    problem = LseProblem(x, y, scale, row_ids, col_ids, first_positive, mask_positives, row_limits)
    logits = logits.masked_fill(is_masked(problem, logits), NONE)
    cols = logsumexp(logits, 0) if need_cols else logits.new_empty(0)
    if not need_max:
        return logsumexp(logits, 1), cols, positives
    col_max = logits.detach().amax(0) if need_cols else cols
    return logsumexp(logits, 1), cols, positives, logits.detach().amax(1), col_max


def is_masked(problem: LseProblem, logits: Tensor) -> Tensor:
    """(n, m) bool: True at the pairs that take no part in the sums."""
    p, (n, m, _) = problem, problem.sizes
    masked = is_positive(n, m, p.first_positive, logits.device) & p.mask_positives
    if p.row_ids is not None and p.col_ids is not None:
        masked = masked | (p.row_ids[:, None] == p.col_ids)
    return masked if p.row_limits is None else masked | (logits.detach() > p.row_limits[:, None])


def is_positive(n: int, m: int, first_positive: int, device: torch.device) -> Tensor:
    """(n, m) bool: True at (i, first_positive + i)."""
    return torch.arange(m, device=device) == torch.arange(n, device=device)[:, None] + first_positive


def stash_shape(n: int, m: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """Nothing is kept: the backward computes the logits again."""
    return (0,), dtype


def forward(problem: LseProblem, need_cols: bool, need_max: bool, stash: Tensor) -> tuple[Tensor, ...]:
    """-> rows (n,), cols (m,) or (0,), positives (n,), maxima of both or (0,), stash shift () (NaN: no stash)."""
    p = problem
    rows, cols, positives, *maxima = dot_lse(
        p.x,
        p.y,
        p.scale,
        p.row_ids,
        p.col_ids,
        p.first_positive,
        p.mask_positives,
        p.row_limits,
        need_cols,
        need_max,
    )
    row_max, col_max = (t.clone() for t in maxima) if need_max else (rows.new_empty(0), rows.new_empty(0))
    no_shift = torch.full_like(p.scale, float("nan"), dtype=rows.dtype)
    return rows, cols, positives.clone(), row_max, col_max, no_shift


def backward(
    problem: LseProblem, sums: LseSums, gradients: LseGradients, need_dx: bool, need_dy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx (n, d), dy (m, d), each empty unless needed, dscale ()."""
    n, x, y, scale = len(problem.x), problem.x, problem.y, problem.scale
    cosines = promote(x) @ promote(y).T
    logits = scale * cosines
    logits = logits.masked_fill(is_masked(problem, logits), NONE)
    rows, cols = (t.masked_fill(t == NONE, 0.0) for t in (sums.rows, sums.cols))
    g = (logits - rows[:, None]).exp() * gradients.rows[:, None]
    if cols.numel():
        g += (logits - cols).exp() * gradients.cols
    g.diagonal(problem.first_positive)[:n] += gradients.positives
    dx = (scale * (g @ promote(y))).to(x.dtype) if need_dx else x.new_empty(0)
    dy = (scale * (g.T @ promote(x))).to(y.dtype) if need_dy else y.new_empty(0)
    return dx, dy, (g * cosines).sum().to(scale.dtype)
