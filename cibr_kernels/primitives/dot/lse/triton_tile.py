"""What the Triton kernels of dot_lse share: a tile of scores, and the units they are kept in.

Scores are kept in units of log2: l2 = log2(e) scale <x_i, y_j>, so that exp(l - shift) = exp2(l2 - shift_log2) is one
fused multiply-add and one ex2.  shift_log2 is a whole number: the exponential of the shift is exact.

    mode 0, fixed    |l| <= 110 everywhere, and no row or column lies more than 55 nats below the shift: one
                     exponential serves the row and the column, and nobody looks for a maximum
    mode 1, online   a maximum for each row and column of each tile, and an exponential for each direction
    mode 2, refused  NaN or infinity in the features, or scores past float32: every output is NaN

The mode lives in device memory, so that nothing waits for the host.  Where it decides between launches, the programs
of the launch that is not wanted find nothing to do.  Every output element has one writer, and sums over tiles are made
in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIXED = tl.constexpr(0)
ONLINE = tl.constexpr(1)
REFUSED = tl.constexpr(2)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def multiply(
    x,
    y,
    row,
    col,
    n,
    m,
    d,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) float32 of x y^T at (row, col).  Past n and m it holds anything finite: mask what you sum.

    TMA: x and y are tensor descriptors with blocks (BLOCK_M, BLOCK_K) and (BLOCK_N, BLOCK_K), which fill with zeros;
    otherwise pointers, and BLOCK_K divides d.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:
        for k in range(0, d, BLOCK_K):
            acc = tl.dot(x.load([row, k]), y.load([col, k]).T, acc, input_precision=PRECISION)
    else:
        step = tl.arange(0, BLOCK_K)
        i = tl.minimum(row + tl.arange(0, BLOCK_M), n - 1).to(tl.int64)
        j = tl.minimum(col + tl.arange(0, BLOCK_N), m - 1).to(tl.int64)
        x_at = x + i[:, None] * d + step[None, :]
        y_at = y + j[:, None] * d + step[None, :]
        for _ in range(0, d // BLOCK_K):
            acc = tl.dot(tl.load(x_at), tl.load(y_at).T, acc, input_precision=PRECISION)
            x_at += BLOCK_K
            y_at += BLOCK_K
    return acc


@triton.jit
def on_diagonal(row, col, first_positive, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether the tile at (row, col) holds a positive."""
    return (col < row + BLOCK_M + first_positive) & (col + BLOCK_N > row + first_positive)


@triton.jit
def same_group(row_ids, col_ids, row, col, n, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N): the pairs at (row, col) whose ids are equal.  Past n and m it holds anything."""
    i, j = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    own = tl.load(row_ids + i, mask=i < n, other=0)
    return own[:, None] == tl.load(col_ids + j, mask=j < m, other=0)[None, :]


@triton.jit
def above_limit(l2, row_limits, row, n, BLOCK_M: tl.constexpr):
    """(BLOCK_M, .): the logits, in units of log2, above the limits of their rows, in nats."""
    i = row + tl.arange(0, BLOCK_M)
    return l2 > (tl.load(row_limits + i, mask=i < n, other=float("inf")) * LOG2E)[:, None]


@triton.jit
def store_panel(
    p, weight, top, col, first_row, n, pitch, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr
):
    """One tile into a panel (rows, pitch), in its dtype."""
    if TMA:
        p.store([top, col], weight.to(p.dtype))
    else:
        i, j = top + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
        mask = (first_row + i < n)[:, None] & (j < pitch)[None, :]
        tl.store(p + i.to(tl.int64)[:, None] * pitch + j[None, :], weight.to(p.dtype.element_ty), mask=mask)


@triton.jit
def rounded(value):
    """The nearest whole number."""
    return tl.floor(value + 0.5)
