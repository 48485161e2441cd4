"""The O(n) ends of the plain clip_loss in Triton, in one launch, which is dot_lse's last fold too: fast_path.py has the
formulas."""

from __future__ import annotations

import triton
import triton.language as tl

from cibr_kernels.dispatch.triton_call import SIZES
from cibr_kernels.primitives.dot.lse.triton_backward import store_weights
from cibr_kernels.primitives.dot.lse.triton_forward import fold
from cibr_kernels.primitives.dot.lse.triton_tile import FIXED, LN2, LOG2E, ONLINE, REFUSED
from cibr_kernels.primitives.dot.softplus.triton_kernels import log1p_of


@triton.jit
def _ends(lse, positive, share, weight, lse2, at, inside, shift, GRADIENT: tl.constexpr):
    """softplus(t) and share sigmoid(t) of t = lse - positive; where GRADIENT the weights of P at `at`."""
    t = lse - positive
    u = tl.exp2(-tl.abs(t) * LOG2E)
    loss = tl.where(inside, tl.maximum(t, 0.0) + log1p_of(u), 0.0)
    slope = tl.where(t > 0.0, 1.0, u) / (1.0 + u) * share
    if GRADIENT:
        store_weights(lse, slope, weight, lse2, at, inside, 0.0, shift)
    return loss, slope


@triton.jit(do_not_specialize=SIZES)
def clip_loss_ends_kernel(
    mode, shift_log2, part_row_max, part_row_sum, part_col_max, part_col_sum, row_max, rows, col_max, cols, positives,
    losses, u, v, rows2, cols2, g_positives, exponent, stash_shift, share, n, panel, strips, col_tiles,
    FOLD: tl.constexpr, COLS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """losses (programs,): share times the sums of softplus(rows - positives) and, where COLS, softplus(cols - ...).

    GRADIENT: dot_lse_weights_kernel of the gradients share sigmoid(rows - positives) and, where COLS, the
    columns'; g_positives (n,) = minus their sums; exponent () = 0, because bfloat16 and float32 need none.
    FOLD: rows and cols (n,) are not finished where the mode is not FIXED: first this is dot_lse_fold_kernel.
    """
    pid = tl.program_id(0)
    at = pid * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = at < n
    state, shift_log2 = tl.load(mode), tl.load(shift_log2)
    positive = tl.load(positives + at, mask=inside, other=0.0)
    col = positive
    if FOLD and state != FIXED:
        refused = state == REFUSED
        row = fold(part_row_max, part_row_sum, row_max, rows, mode, state, shift_log2, None, None, 0, pid,
                   tl.where(refused, 0, col_tiles), n, panel, 1, True, n, n, 0, ONLINE, True, False, True,
                   BLOCK_T, BLOCK_L)  # fmt: skip
        if COLS:
            col = fold(part_col_max, part_col_sum, col_max, cols, mode, state, shift_log2, None, None, 0, pid,
                       tl.where(refused, 0, strips), n, n, 1, True, n, n, 0, ONLINE, True, False, True,
                       BLOCK_T, BLOCK_L)  # fmt: skip
        positive = tl.where(refused, float("nan"), positive)
    else:
        row = tl.load(rows + at, mask=inside, other=0.0)
        if COLS:
            col = tl.load(cols + at, mask=inside, other=0.0)
    shift = tl.where(state == FIXED, shift_log2 * LN2, float("nan"))
    loss, slope = _ends(row, positive, share, u, rows2, at, inside, shift, GRADIENT)
    if COLS:
        col_loss, col_slope = _ends(col, positive, share, v, cols2, at, inside, shift, GRADIENT)
        loss += col_loss
        slope += col_slope
    tl.store(losses + pid, tl.sum(loss, 0) * share)
    if GRADIENT:
        tl.store(g_positives + at, -slope, mask=inside)
        if pid == 0:
            tl.store(exponent, 0.0)
            tl.store(stash_shift, shift)
