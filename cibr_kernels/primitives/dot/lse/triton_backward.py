"""The Triton kernels of dot_lse's backward: exponent, weights, then per panel P and the gradients of its features.

    P_ij = exp(l_ij - rows_i) g_rows_i + exp(l_ij - cols_j) g_cols_j,  times 2^exponent so that float16 keeps its digits

P of a panel is a matrix (rows, pitch) in the features' dtype, zero at masked pairs; the vendor's matmuls follow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cibr_kernels.dispatch.triton_call import SIZES
from cibr_kernels.primitives.dot.lse.triton_tile import (
    LOG2E,
    above_limit,
    multiply,
    on_diagonal,
    rounded,
    same_group,
    store_panel,
)


@triton.jit(do_not_specialize=SIZES)
def dot_exponent_kernel(g_rows, g_cols, exponent, n, m, BLOCK: tl.constexpr):
    """exponent (): the power of two that brings the largest |gradient weight| to [2^13, 2^14); one program.

    Weights of a mean over many rows are small and probabilities smaller: so scaled they keep their digits in float16,
    and P <= 2^15 stays below its largest number.
    """
    largest = tl.maximum(_largest_magnitude(g_rows, n, BLOCK), _largest_magnitude(g_cols, m, BLOCK))
    scaled = (largest > 1e-25) & (largest < 1e25)
    tl.store(exponent, tl.where(scaled, 13.0 - tl.floor(tl.log2(tl.where(scaled, largest, 1.0))), 0.0))


@triton.jit
def _largest_magnitude(values, count, BLOCK: tl.constexpr):
    best = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, count, BLOCK):
        at = k + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.abs(tl.load(values + at, mask=at < count, other=0.0)))
    return tl.max(best, 0)


@triton.jit
def store_weights(value, grad, weight, lse2, at, inside, exponent, stash_shift):
    """weight and lse2 at `at`, of a log-sum-exp and its gradient: dot_lse_weights_kernel."""
    none = (value == -float("inf")) | (grad == 0.0)
    value2 = value * LOG2E
    grad *= tl.exp2(exponent)
    if stash_shift == stash_shift:
        grad *= tl.exp2(tl.where(none, 0.0, rounded(stash_shift * LOG2E) - value2))
    tl.store(weight + at, tl.where(none, 0.0, grad), mask=inside)
    tl.store(lse2 + at, tl.where(value == -float("inf"), float("inf"), value2), mask=inside)


@triton.jit
def _weights(g, lse, weight, lse2, exponent, stash_shift, block, length, BLOCK_L: tl.constexpr):
    at = block * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = at < length
    value, grad = tl.load(lse + at, mask=inside, other=0.0), tl.load(g + at, mask=inside, other=0.0)
    store_weights(value, grad, weight, lse2, at, inside, exponent, stash_shift)


@triton.jit(do_not_specialize=SIZES)
def dot_lse_weights_kernel(
    g_rows, g_cols, rows, cols, u, v, rows2, cols2, exponent, stash_shift, n, m, row_blocks, BLOCK_L: tl.constexpr
):
    """u (n,) and v (m,) of P_ij = exp2(l2 - shift_log2) (u_i + v_j), times 2^exponent, where the shift is fixed.

    Where it is not (NaN), those of P_ij = exp2(l2 - rows2_i) u_i + exp2(l2 - cols2_j) v_j.
    """
    pid = tl.program_id(0)
    shift, power = tl.load(stash_shift), tl.load(exponent)
    if pid < row_blocks:
        _weights(g_rows, rows, u, rows2, power, shift, pid, n, BLOCK_L)
    else:
        _weights(g_cols, cols, v, cols2, power, shift, pid - row_blocks, m, BLOCK_L)


@triton.jit
def _without_masked(
    weight,
    row_ids,
    col_ids,
    row,
    col,
    n,
    m,
    first_positive,
    MASK: tl.constexpr,
    IDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if IDS:
        weight = tl.where(same_group(row_ids, col_ids, row, col, n, m, BLOCK_M, BLOCK_N), 0.0, weight)
    if MASK and on_diagonal(row, col, first_positive, BLOCK_M, BLOCK_N):
        i, j = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
        weight = tl.where(j[None, :] == i[:, None] + first_positive, 0.0, weight)
    return weight


@triton.jit
def _gradient(
    x, y, scale2, shift, row_ids, col_ids, row_limits, u, v, p, top, col, first_row, n, m, d, first_positive, pitch,
    MASK: tl.constexpr, IDS: tl.constexpr, LIMITS: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile of P at row `top` of the panel."""
    row = first_row + top
    i, j = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    acc = multiply(x, y, row, col, n, m, d, BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION)
    weight = tl.load(u + i, mask=i < n, other=0.0)[:, None]
    if COLS:
        weight = weight + tl.load(v + j, mask=j < m, other=0.0)[None, :]
    weight = tl.exp2(acc * scale2 - shift) * weight
    weight = _without_masked(weight, row_ids, col_ids, row, col, n, m, first_positive, MASK, IDS, BLOCK_M, BLOCK_N)
    if LIMITS:
        weight = tl.where(above_limit(acc * scale2, row_limits, row, n, BLOCK_M), 0.0, weight)
    store_panel(p, weight, top, col, first_row, n, pitch, BLOCK_M, BLOCK_N, TMA)


@triton.jit(do_not_specialize=["first_row", "n", "strips", "strip_tiles"])  # m too would spill registers
def dot_lse_gradient_kernel(
    x, y, scale, stash_shift, row_ids, col_ids, row_limits, u, v, p, first_row, n, m, d, first_positive, pitch, strips,
    strip_tiles, MASK: tl.constexpr, IDS: tl.constexpr, LIMITS: tl.constexpr, COLS: tl.constexpr, STRIPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p (panel, pitch) = exp2(l2 - shift_log2) (u_i + v_j) of rows [first_row, n), zero at masked pairs.

    row_ids (n,) and col_ids (m,): where IDS; row_limits (n,): where LIMITS.  Nothing where there is no fixed shift.
    One tile a program, or strips: dot_lse_scores_kernel.
    """
    fixed = tl.load(stash_shift)
    if fixed == fixed:
        strip, col = tl.program_id(0) % strips, tl.program_id(0) // strips * BLOCK_N
        scale2, shift = tl.load(scale) * LOG2E, rounded(fixed * LOG2E)
        if STRIPS:
            first = strip * strip_tiles * BLOCK_M
            last = tl.minimum(first + strip_tiles * BLOCK_M, n - first_row)
            for top in tl.range(first, last, BLOCK_M, warp_specialize=True):
                _gradient(
                    x, y, scale2, shift, row_ids, col_ids, row_limits, u, v, p, top, col, first_row, n, m, d,
                    first_positive, pitch, MASK, IDS, LIMITS, COLS, BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION,
                )  # fmt: skip
        else:
            _gradient(
                x, y, scale2, shift, row_ids, col_ids, row_limits, u, v, p, strip * BLOCK_M, col, first_row, n, m, d,
                first_positive, pitch, MASK, IDS, LIMITS, COLS, BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def dot_lse_online_gradient_kernel(
    x, y, scale, stash_shift, row_ids, col_ids, row_limits, u, v, rows2, cols2, p, first_row, n, m, d, first_positive,
    pitch, MASK: tl.constexpr, IDS: tl.constexpr, LIMITS: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p (panel, pitch) = exp2(l2 - rows2_i) u_i + exp2(l2 - cols2_j) v_j, where there is no fixed shift.

    A program takes every num_programs-th tile, so that few programs suffice to find that nothing is wanted.
    """
    fixed = tl.load(stash_shift)
    row_tiles = tl.cdiv(n - first_row, BLOCK_M)
    tiles = tl.where(fixed == fixed, 0, row_tiles * tl.cdiv(m, BLOCK_N))
    scale2 = tl.load(scale) * LOG2E
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        top, col = tile % row_tiles * BLOCK_M, tile // row_tiles * BLOCK_N
        row = first_row + top
        i, j = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
        l2 = scale2 * multiply(x, y, row, col, n, m, d, BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION)
        high = tl.load(rows2 + i, mask=i < n, other=float("inf"))[:, None]
        weight = tl.exp2(l2 - high) * tl.load(u + i, mask=i < n, other=0.0)[:, None]
        if COLS:
            high = tl.load(cols2 + j, mask=j < m, other=float("inf"))[None, :]
            weight += tl.exp2(l2 - high) * tl.load(v + j, mask=j < m, other=0.0)[None, :]
        weight = _without_masked(weight, row_ids, col_ids, row, col, n, m, first_positive, MASK, IDS, BLOCK_M, BLOCK_N)
        if LIMITS:
            weight = tl.where(above_limit(l2, row_limits, row, n, BLOCK_M), 0.0, weight)
        store_panel(p, weight, top, col, first_row, n, pitch, BLOCK_M, BLOCK_N, TMA)


@triton.jit(do_not_specialize=SIZES)
def dot_lse_unstash_kernel(
    e, stash_shift, u, v, p, first_row, n, m, pitch,
    COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """p = e (u_i + v_j), both (panel, pitch), for rows [first_row, n); nothing where e was not written."""
    shift = tl.load(stash_shift)
    if shift == shift:
        row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        i, j = first_row + row, tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        at = row.to(tl.int64)[:, None] * pitch + j[None, :]
        mask = (i < n)[:, None] & (j < pitch)[None, :]
        weight = tl.load(u + i, mask=i < n, other=0.0)[:, None]
        if COLS:
            weight = weight + tl.load(v + j, mask=j < m, other=0.0)[None, :]
        value = tl.load(e + at, mask=mask, other=0.0).to(tl.float32) * weight
        tl.store(p + at, value.to(p.dtype.element_ty), mask=mask)


@triton.jit
def _features_gradient(
    sums, own, partner, g_positives, scale, exponent, g, out, block, rows, partners, d, shift, g_shift,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dot_features_gradient_kernel for a block of rows -> the sum of <own_r, out_r> / scale, of the unrounded out."""
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < rows
    paired = inside & (r + shift >= 0) & (r + shift < partners)
    g_pair = tl.load(g_positives + (r + g_shift), mask=paired, other=0.0)[:, None]
    factor, power, upstream = tl.load(scale), tl.exp2(-tl.load(exponent)), 1.0
    if g is not None:
        upstream = tl.load(g)
    here = r.to(tl.int64)[:, None] * d
    there = (r + shift).to(tl.int64)[:, None] * d
    dot = tl.zeros((BLOCK_R,), tl.float32)
    for k in range(0, d, BLOCK_D):
        at = k + tl.arange(0, BLOCK_D)[None, :]
        mask = inside[:, None] & (at < d)
        other = tl.load(partner + there + at, mask=paired[:, None] & (at < d), other=0.0).to(tl.float32)
        grad = (tl.load(sums + here + at, mask=mask, other=0.0) * power + g_pair * other) * upstream
        dot += tl.sum(grad * tl.load(own + here + at, mask=mask, other=0.0).to(tl.float32), 1)
        tl.store(out + here + at, (grad * factor).to(out.dtype.element_ty), mask=mask)
    return tl.sum(dot, 0)


@triton.jit(do_not_specialize=SIZES)
def dot_features_gradient_kernel(
    sums, own, partner, g_positives, scale, exponent, g, out, along, rows, partners, d, shift, g_shift,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out_r = g scale (2^-exponent sums_r + g_positives_{r + g_shift} partner_{r + shift}), in the features' dtype.

    All (rows, d); a row without a partner has only the sums.  g (): 1 where it is None.  along (programs,): sum of
    <own_r, out_r> / scale from the unrounded out.
    """
    dot = _features_gradient(
        sums, own, partner, g_positives, scale, exponent, g, out, tl.program_id(0), rows, partners, d, shift, g_shift,
        BLOCK_R, BLOCK_D,
    )  # fmt: skip
    tl.store(along + tl.program_id(0), dot)


@triton.jit(do_not_specialize=SIZES)
def dot_both_features_gradients_kernel(
    x_sums, y_sums, x, y, g_positives, scale, exponent, g, dx, dy, along, n, m, d, first_positive, x_blocks,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dot_features_gradient_kernel for dx (n, d) in programs below x_blocks and for dy (m, d) in the others.

    along (x_blocks,): of dx.
    """
    pid = tl.program_id(0)
    if pid < x_blocks:
        dot = _features_gradient(
            x_sums, x, y, g_positives, scale, exponent, g, dx, pid, n, m, d, first_positive, 0, BLOCK_R, BLOCK_D
        )
        tl.store(along + pid, dot)
    else:
        _features_gradient(
            y_sums, y, x, g_positives, scale, exponent, g, dy, pid - x_blocks, m, n, d, -first_positive,
            -first_positive, BLOCK_R, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def dot_total_kernel(parts, out, count, BLOCK: tl.constexpr):
    """out (programs,) = sums of every programs-th block of parts (count,), always in the same order."""
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        at = k + tl.arange(0, BLOCK)
        total += tl.load(parts + at, mask=at < count, other=0.0)
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=SIZES)
def dot_lse_owned_gradient_kernel(
    own, partner, scale, stash_shift, own_ids, partner_ids, a, b, a2, b2, sums, rows, partners, d, first_positive,
    MASK: tl.constexpr, IDS: tl.constexpr, OWN_WEIGHT: tl.constexpr, PARTNER_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sums (rows, d) float32 = P partner for BLOCK_M rows: P stays in registers, d <= BLOCK_D, 2 passes instead of 1.

    own (rows, d) and partner (partners, d) are x and y for dx, y and x for dy; own_ids and partner_ids, where IDS, the
    groups of their rows; a, a2 and b, b2 the weights, if any (dot_lse_weights_kernel).  The positive of row i is
    partner i + first_positive.
    """
    fixed = tl.load(stash_shift)
    scale2, shift = tl.load(scale) * LOG2E, rounded(fixed * LOG2E)
    row = tl.program_id(0) * BLOCK_M
    i, k = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    at = i.to(tl.int64)[:, None] * d + k[None, :]
    inside = (i < rows)[:, None] & (k < d)[None, :]
    q = tl.load(own + at, mask=inside, other=0.0)
    weight_i, high_i = 0.0, 0.0
    if OWN_WEIGHT:
        weight_i = tl.load(a + i, mask=i < rows, other=0.0)[:, None]
        high_i = tl.load(a2 + i, mask=i < rows, other=float("inf"))[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for col in range(0, partners, BLOCK_N):
        j = col + tl.arange(0, BLOCK_N)
        there = j.to(tl.int64)[:, None] * d + k[None, :]
        t = tl.load(partner + there, mask=(j < partners)[:, None] & (k < d)[None, :], other=0.0)
        l2 = tl.dot(q, t.T) * scale2
        weight_j = 0.0
        if PARTNER_WEIGHT:
            weight_j = tl.load(b + j, mask=j < partners, other=0.0)[None, :]
        if fixed == fixed:
            p = tl.exp2(l2 - shift) * (weight_i + weight_j)
        else:
            p = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if OWN_WEIGHT:
                p += tl.exp2(l2 - high_i) * weight_i
            if PARTNER_WEIGHT:
                high = tl.load(b2 + j, mask=j < partners, other=float("inf"))
                p += tl.exp2(l2 - high[None, :]) * weight_j
        p = _without_masked(
            p, own_ids, partner_ids, row, col, rows, partners, first_positive, MASK, IDS, BLOCK_M, BLOCK_N
        )
        if col + BLOCK_N > partners:  # scores of padding are zero, which may be far above every other: infinity * 0
            p = tl.where((j < partners)[None, :], p, 0.0)
        acc = tl.dot(p.to(t.dtype), t, acc)
    tl.store(sums + at, acc, mask=inside)
