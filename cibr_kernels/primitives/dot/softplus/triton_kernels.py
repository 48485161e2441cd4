"""The Triton kernels of dot_softplus: poison, then per panel of rows the sums of tiles and, where wanted, G.

Logits are kept in units of log2, t2 = log2(e) t, so that u = exp(-|t|) is one fused multiply-add and one ex2.  With
u <= 1 neither softplus(t) = max(t, 0) + log1p(u) nor sigmoid(t) = exp(min(t, 0) - log1p(u)), without a division, can
overflow, and both keep their digits where t is far below 0.  A pair that does not count has t2 = -inf: its u is 0.

Every output element has one writer, and sums over tiles are made in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cibr_kernels.dispatch.triton_call import SIZES
from cibr_kernels.primitives.dot.lse.triton_tile import LN2, LOG2E, multiply, on_diagonal, store_panel
from cibr_kernels.primitives.triton_sums import sums_reduce_kernel as sums_reduce_kernel


@triton.jit(do_not_specialize=SIZES)
def dot_softplus_poison_kernel(x, y, parts, x_count, y_count, x_blocks, BLOCK: tl.constexpr):
    """parts (programs,): 0, or NaN where a block of x (programs below x_blocks) or of y holds NaN or infinity.

    x and y have x_count and y_count elements.  A logit of -infinity would otherwise be a pair that does not count.
    """
    pid = tl.program_id(0)
    if pid < x_blocks:
        at = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        v = tl.load(x + at, mask=at < x_count, other=0.0)
    else:
        at = (pid - x_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        v = tl.load(y + at, mask=at < y_count, other=0.0)
    tl.store(parts + pid, tl.sum(v.to(tl.float32) * 0.0, 0))


@triton.jit(do_not_specialize=SIZES)
def siglip_loss_positives_kernel(
    x, y, scale, bias, poison, positives, share, g_positives, weights, exponent, unit, n, d,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """positives_i = scale <x_i, y_i> + bias, g_positives_i = -share sigmoid(-positives_i), weights_i = share (n,).

    poison (programs,): 0, or NaN where a row of x or y holds NaN or infinity.  exponent () = unit.
    """
    i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = i < n
    product, wrong = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    for k in range(0, d, BLOCK_D):
        at = k + tl.arange(0, BLOCK_D)[None, :]
        mask = inside[:, None] & (at < d)
        a = tl.load(x + i.to(tl.int64)[:, None] * d + at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(y + i.to(tl.int64)[:, None] * d + at, mask=mask, other=0.0).to(tl.float32)
        product += tl.sum(a * b, 1)
        wrong += tl.sum(a * 0.0 + b * 0.0, 1)
    t = product * tl.load(scale) + tl.load(bias)
    u = tl.exp2(-tl.abs(t) * LOG2E)
    tl.store(positives + i, t, mask=inside)
    tl.store(g_positives + i, -share * tl.where(t > 0.0, u, 1.0) / (1.0 + u), mask=inside)
    tl.store(weights + i, tl.zeros((BLOCK_R,), tl.float32) + share, mask=inside)
    tl.store(poison + tl.program_id(0), tl.sum(wrong, 0))
    if tl.program_id(0) == 0:
        tl.store(exponent, unit)


@triton.jit(do_not_specialize=SIZES)
def loss_times_kernel(
    g, dx, dy, dscale, dbias, dx_out, dy_out, dscale_out, dbias_out, x_count, y_count, x_blocks, BLOCK: tl.constexpr
):
    """g () times dx (x_count,) in programs below x_blocks and dy (y_count,) in the others; program 0: dscale, dbias."""
    pid, upstream = tl.program_id(0), tl.load(g)
    if pid < x_blocks:
        at = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(dx + at, mask=at < x_count, other=0.0).to(tl.float32) * upstream
        tl.store(dx_out + at, value.to(dx_out.dtype.element_ty), mask=at < x_count)
    else:
        at = (pid - x_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(dy + at, mask=at < y_count, other=0.0).to(tl.float32) * upstream
        tl.store(dy_out + at, value.to(dy_out.dtype.element_ty), mask=at < y_count)
    if pid == 0:
        tl.store(dscale_out, tl.load(dscale) * upstream)
        tl.store(dbias_out, tl.load(dbias) * upstream)


@triton.jit(do_not_specialize=SIZES)
def siglip_loss_losses_kernel(
    parts, positives, g_positives, losses, g_sums, share, rows, tiles, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr
):
    """losses (programs,) = share times the sums of parts (tiles, rows) and of softplus(-positives) (rows,).

    g_sums (programs,), unless None, = sums of g_positives (rows,).
    """
    at = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = at < rows
    t = -tl.load(positives + at, mask=inside, other=0.0)
    total = tl.where(inside, tl.maximum(t, 0.0) + log1p_of(tl.exp2(-tl.abs(t) * LOG2E)), 0.0)
    for first in range(0, tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        mask = (tile < tiles)[:, None] & inside[None, :]
        total += tl.sum(tl.load(parts + tile.to(tl.int64)[:, None] * rows + at[None, :], mask=mask, other=0.0), 0)
    tl.store(losses + tl.program_id(0), tl.sum(total, 0) * share)
    if g_sums is not None:
        tl.store(g_sums + tl.program_id(0), tl.sum(tl.load(g_positives + at, mask=inside, other=0.0), 0))


@triton.jit
def log1p_of(u):
    """log(1 + u) for 0 <= u <= 1, to 1e-7 of itself: u + u^2 q(u), q fitted to the relative error."""
    q = u * 0.00536481226 - 0.030065744
    q = q * u + 0.0792044573
    q = q * u - 0.137537957
    q = q * u + 0.191536519
    q = q * u - 0.248571629
    q = q * u + 0.333213225
    q = q * u - 0.49999648
    return u * u * q + u


@triton.jit
def _tile(
    x, y, row_ids, col_ids, scale2, bias2, g_rows, g_cols, power, p, row_sum, above, top, col, first_row, n, m, d,
    first_positive, pitch, IDS: tl.constexpr, ATTRACT: tl.constexpr, COLS: tl.constexpr, GRADIENT: tl.constexpr,
    COL_WEIGHTS: tl.constexpr, STRIPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile at row `top` of the panel; writes its row sums and, where GRADIENT, its part of G.

    -> the sums of e over the rows, or where STRIPS above + e, to be summed after the last tile; the sums of G over the
    columns.
    """
    row = first_row + top
    i, j = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    product = multiply(x, y, row, col, n, m, d, BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION)
    t2 = product * scale2 + bias2
    nothing = bias2 - float("inf")  # NaN where bias2 is
    if IDS:
        own, other = tl.load(row_ids + i, mask=i < n, other=0), tl.load(col_ids + j, mask=j < m, other=0)
        same = own[:, None] == other[None, :]
        t2 = tl.where(same, -t2 if ATTRACT else nothing, t2)
    if on_diagonal(row, col, first_positive, BLOCK_M, BLOCK_N) | (row + BLOCK_M > n) | (col + BLOCK_N > m):
        counts = (i < n)[:, None] & (j < m)[None, :] & (j[None, :] != i[:, None] + first_positive)
        t2 = tl.where(counts, t2, nothing)
    u = tl.exp2(-tl.abs(t2))
    log1p = log1p_of(u)
    e = tl.maximum(t2, 0.0) * LN2 + log1p
    tl.store(row_sum + top + tl.arange(0, BLOCK_M), tl.sum(e, 1), mask=i < n)
    if COLS:
        above = above + (e if STRIPS else tl.sum(e, 0))
    total = tl.zeros((BLOCK_M,), tl.float32)
    if GRADIENT:
        weight = tl.load(g_rows + i, mask=i < n, other=0.0)[:, None] * power
        if COL_WEIGHTS:
            weight = weight + tl.load(g_cols + j, mask=j < m, other=0.0)[None, :] * power
        # in strips Triton 3.8 specialises 896 threads for the form without a division (sm_100), and they spill
        sigmoid = tl.where(t2 > 0.0, 1.0, u) / (1.0 + u) if STRIPS else tl.exp2(tl.minimum(t2, 0.0) - log1p * LOG2E)
        g = sigmoid * weight
        if IDS and ATTRACT:
            g = tl.where(same, -g, g)
        store_panel(p, g, top, col, first_row, n, pitch, BLOCK_M, BLOCK_N, TMA)
        total = tl.sum(g, 1)
    return above, total


@triton.jit(do_not_specialize=SIZES)
def dot_softplus_sweep_kernel(
    x, y, row_ids, col_ids, scale, bias, poison, g_rows, g_cols, exponent, p, row_sum, col_sum, totals,
    first_row, n, m, d, first_positive, rows, pitch, strips, strip_tiles, first_part,
    IDS: tl.constexpr, ATTRACT: tl.constexpr, COLS: tl.constexpr, GRADIENT: tl.constexpr, COL_WEIGHTS: tl.constexpr,
    STRIPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of e_ij over tiles of rows [first_row, n) and all m columns.

    row_sum (column tiles, rows) and col_sum (strips, m) get the sums of each tile.
    IDS: pairs with row_ids_i = col_ids_j do not count, or ATTRACT.  poison () is 0 or NaN.
    GRADIENT: p (rows, pitch) = 2^exponent G in the features' dtype; totals, from first_part on, the float32 sum of G of
    each program.

    A program makes one tile or, where STRIPS, strip_tiles tiles below one another: dot_lse_scores_kernel.
    """
    strip, col_tile = tl.program_id(0) % strips, tl.program_id(0) // strips
    scale2, bias2 = tl.load(scale) * LOG2E, (tl.load(bias) + tl.load(poison)) * LOG2E
    bias2 += (scale2 - scale2) + (bias2 - bias2)  # NaN where one of them is not finite
    power = 1.0
    if GRADIENT:
        power = tl.exp2(tl.load(exponent))
    col = col_tile * BLOCK_N
    row_at = row_sum + col_tile.to(tl.int64) * rows
    total = tl.zeros((BLOCK_M,), tl.float32)
    if STRIPS:
        above = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        first = strip * strip_tiles * BLOCK_M
        last = tl.minimum(first + strip_tiles * BLOCK_M, n - first_row)
        for top in tl.range(first, last, BLOCK_M, warp_specialize=True):
            above, tile_total = _tile(
                x, y, row_ids, col_ids, scale2, bias2, g_rows, g_cols, power, p, row_at, above, top, col, first_row, n,
                m, d, first_positive, pitch, IDS, ATTRACT, COLS, GRADIENT, COL_WEIGHTS, STRIPS, BLOCK_M, BLOCK_N,
                BLOCK_K, TMA, PRECISION,
            )  # fmt: skip
            total += tile_total
        cols = tl.sum(above, 0)
    else:
        cols, total = _tile(
            x, y, row_ids, col_ids, scale2, bias2, g_rows, g_cols, power, p, row_at, tl.zeros((BLOCK_N,), tl.float32),
            strip * BLOCK_M, col, first_row, n, m, d, first_positive, pitch, IDS, ATTRACT, COLS, GRADIENT, COL_WEIGHTS,
            STRIPS, BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION,
        )  # fmt: skip
    if COLS:
        j = col + tl.arange(0, BLOCK_N)
        tl.store(col_sum + strip.to(tl.int64) * m + j, cols, mask=j < m)
    if GRADIENT:
        part = first_part + tl.program_id(0)
        tl.store(totals + part, tl.sum(total, 0) * tl.exp2(-tl.load(exponent)))
