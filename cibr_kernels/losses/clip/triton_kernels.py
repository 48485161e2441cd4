"""The O(n) ends of the plain clip_loss in Triton, one launch each: fast_path.py has the formulas."""

from __future__ import annotations

import triton
import triton.language as tl

from cibr_kernels.dispatch.triton_call import SIZES
from cibr_kernels.primitives.dot.lse.triton_backward import store_weights
from cibr_kernels.primitives.dot.lse.triton_tile import LOG2E
from cibr_kernels.primitives.dot.softplus.triton_kernels import log1p_of


@triton.jit
def _margin(lse, positives, at, inside):
    """t = lse - positive, and exp(-|t|)."""
    t = tl.load(lse + at, mask=inside, other=0.0) - tl.load(positives + at, mask=inside, other=0.0)
    return t, tl.exp2(-tl.abs(t) * LOG2E)


@triton.jit
def _softplus(lse, positives, at, inside):
    t, u = _margin(lse, positives, at, inside)
    return tl.where(inside, tl.maximum(t, 0.0) + log1p_of(u), 0.0)


@triton.jit
def _sigmoid(lse, positives, at, inside):
    t, u = _margin(lse, positives, at, inside)
    return tl.where(t > 0.0, 1.0, u) / (1.0 + u)


@triton.jit(do_not_specialize=SIZES)
def losses_kernel(rows, cols, positives, losses, share, n, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """losses (programs,): share times the sums of softplus(rows - positives) and, where COLS, softplus(cols - ...)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    total = _softplus(rows, positives, at, inside)
    if COLS:
        total += _softplus(cols, positives, at, inside)
    tl.store(losses + tl.program_id(0), tl.sum(total, 0) * share)


@triton.jit(do_not_specialize=SIZES)
def slopes_kernel(
    g, rows, cols, positives, u, v, rows2, cols2, g_positives, exponent, stash_shift, share, n, COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """triton_backward.weights_kernel, of the gradients g share sigmoid(rows - positives) and, where COLS, the columns'.

    g_positives (n,) = minus their sums; exponent () = 0, because bfloat16 and float32 need none.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    shift, share = tl.load(stash_shift), tl.load(g) * share
    row = tl.load(rows + at, mask=inside, other=0.0)
    slope = _sigmoid(rows, positives, at, inside) * share
    store_weights(row, slope, u, rows2, at, inside, 0.0, shift)
    if COLS:
        col = tl.load(cols + at, mask=inside, other=0.0)
        col_slope = _sigmoid(cols, positives, at, inside) * share
        store_weights(col, col_slope, v, cols2, at, inside, 0.0, shift)
        slope += col_slope
    tl.store(g_positives + at, -slope, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(exponent, 0.0)
