"""dot_lse in plain PyTorch: the specification.  It promotes instead of casting, so float64 in is the oracle.

l_ij = scale <x_i, y_j>        row i's positive is column offset + i
rows_i = log sum_j exp l_ij    cols_j = log sum_i exp l_ij    positives_i = l_i,offset+i
"""

from __future__ import annotations

import torch
from torch import Tensor

NONE = float("-inf")


def dot_lse(
    x: Tensor, y: Tensor, scale: Tensor, offset: int = 0, mask_positives: bool = True, need_cols: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """x (n, d), y (m, d), scale () -> rows (n,), cols (m,) or (0,), positives (n,), differentiable in all three.

    With `mask_positives` they take no part in the sums; the sum of nothing is -inf.
    """
    logits = scale * (_promote(x) @ _promote(y).T)  # (n, m)
    positives = logits.diagonal(offset)[: len(x)]
    if mask_positives:
        logits = logits.masked_fill(is_positive(len(x), len(y), offset, x.device), NONE)
    return _logsumexp(logits, 1), _logsumexp(logits, 0) if need_cols else logits.new_empty(0), positives


def is_positive(n: int, m: int, offset: int, device: torch.device) -> Tensor:
    """(n, m) bool: True at (i, offset + i)."""
    return torch.arange(m, device=device) == torch.arange(n, device=device)[:, None] + offset


def _promote(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _logsumexp(t: Tensor, dim: int) -> Tensor:
    """logsumexp whose gradient is zero, not NaN, where the sum is empty."""
    empty = (t == NONE).all(dim, keepdim=True)
    return t.masked_fill(empty, 0.0).logsumexp(dim).masked_fill(empty.squeeze(dim), NONE)


def unsupported(*tensors: Tensor) -> str | None:
    return None


def stash_shape(n: int, m: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """Nothing is kept: the backward computes the logits again."""
    return (0,), dtype


def forward(
    x: Tensor, y: Tensor, scale: Tensor, offset: int, mask_positives: bool, need_cols: bool, stash: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> rows (n,), cols (m,) or (0,), positives (n,), stash offset () (NaN: not written)."""
    rows, cols, positives = dot_lse(x, y, scale, offset, mask_positives, need_cols)
    return rows, cols, positives.clone(), torch.full_like(scale, float("nan"), dtype=rows.dtype)


def backward(
    g_rows: Tensor, g_cols: Tensor, g_positives: Tensor, x: Tensor, y: Tensor, scale: Tensor, rows: Tensor,
    cols: Tensor, positives: Tensor, stash_offset: Tensor, stash: Tensor, offset: int, mask_positives: bool,
    need_dx: bool, need_dy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx (n, d), dy (m, d), each empty unless needed, dscale ()."""
    n, m = len(x), len(y)
    cosines = _promote(x) @ _promote(y).T
    logits = scale * cosines
    if mask_positives:
        logits = logits.masked_fill(is_positive(n, m, offset, x.device), NONE)
    g = (logits - rows.masked_fill(rows == NONE, 0.0)[:, None]).exp() * g_rows[:, None]
    if cols.numel():
        g += (logits - cols.masked_fill(cols == NONE, 0.0)).exp() * g_cols
    g.diagonal(offset)[:n] += g_positives
    dx = (scale * (g @ _promote(y))).to(x.dtype) if need_dx else x.new_empty(0)
    dy = (scale * (g.T @ _promote(x))).to(y.dtype) if need_dy else y.new_empty(0)
    return dx, dy, (g * cosines).sum().to(scale.dtype)
