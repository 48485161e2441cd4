"""The Triton kernels of dot_lse's forward: statistics, choose, (scores, fold) per panel; then again online."""

from __future__ import annotations

import triton
import triton.language as tl

from cibr_kernels.dispatch.triton_call import SIZES
from cibr_kernels.primitives.dot.lse.triton_tile import (
    FIXED,
    LN2,
    LOG2E,
    ONLINE,
    REFUSED,
    above_limit,
    multiply,
    on_diagonal,
    same_group,
    store_panel,
)  # fmt: skip

FIXED_BOUND = tl.constexpr(110.0)  # nats; the largest |l| that the fixed shift serves: csrc/dot/sweep.h has the same
HEADROOM = tl.constexpr(60.0)  # exp(60) (n + m) stays far from overflow
UNDERFLOW = tl.constexpr(55.0)  # exp(-55) of the shift still leaves 30 nats above the smallest float


@triton.jit(do_not_specialize=SIZES)
def dot_lse_statistics_kernel(
    x, y, scale, positives, largest, n, m, d, first_positive, x_blocks, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The largest squared norm of each block of BLOCK_R rows (infinity for NaN), and positives_i = scale <x_i, y_i+>.

    Programs below x_blocks take x's rows, the others y's.  largest: (programs,).
    """
    pid = tl.program_id(0)
    if pid < x_blocks:
        i = pid * BLOCK_R + tl.arange(0, BLOCK_R)
        tl.store(largest + pid, _largest_square(x, i, n, d, BLOCK_R, BLOCK_D))
        product = tl.zeros((BLOCK_R,), tl.float32)
        for k in range(0, d, BLOCK_D):
            at = k + tl.arange(0, BLOCK_D)[None, :]
            mask = (i < n)[:, None] & (at < d)
            a = tl.load(x + i.to(tl.int64)[:, None] * d + at, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(y + (i + first_positive).to(tl.int64)[:, None] * d + at, mask=mask, other=0.0).to(tl.float32)
            product += tl.sum(a * b, 1)
        tl.store(positives + i, product * tl.load(scale), mask=i < n)
    else:
        j = (pid - x_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
        tl.store(largest + pid, _largest_square(y, j, m, d, BLOCK_R, BLOCK_D))


@triton.jit
def _largest_square(features, rows, count, d, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    square = tl.zeros((BLOCK_R,), tl.float32)
    for k in range(0, d, BLOCK_D):
        at = k + tl.arange(0, BLOCK_D)[None, :]
        mask = (rows < count)[:, None] & (at < d)
        a = tl.load(features + rows.to(tl.int64)[:, None] * d + at, mask=mask, other=0.0).to(tl.float32)
        square += tl.sum(a * a, 1)
    return tl.max(tl.where(square <= 3e38, square, float("inf")), 0)


@triton.jit
def _largest(values, count, BLOCK: tl.constexpr):
    best = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, count, BLOCK):
        at = k + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(values + at, mask=at < count, other=0.0))
    return tl.max(best, 0)


@triton.jit(do_not_specialize=SIZES)
def dot_lse_choose_kernel(largest, scale, mode, shift_log2, x_blocks, blocks, BLOCK: tl.constexpr):
    """mode () int32 and shift_log2 () float32 from the bound B = |scale| max|x_i| max|y_j|; one program."""
    a = _largest(largest, x_blocks, BLOCK)
    b = _largest(largest + x_blocks, blocks - x_blocks, BLOCK)
    bound = tl.abs(tl.load(scale)) * tl.sqrt(a) * tl.sqrt(b)
    tl.store(mode, tl.where(bound <= FIXED_BOUND, FIXED, tl.where(bound < 1e37, ONLINE, REFUSED)))
    tl.store(shift_log2, tl.floor(tl.maximum(bound - HEADROOM, 0.0) * LOG2E))


@triton.jit
def _scores(
    x, y, row, col, scale2, shift, row_ids, col_ids, row_limits, n, m, d, first_positive,
    MASK: tl.constexpr, IDS: tl.constexpr, LIMITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """l2 - shift of one tile, -inf at padding and masked pairs."""
    acc = multiply(x, y, row, col, n, m, d, BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION)
    l2 = acc * scale2 - shift
    has_positive = MASK and on_diagonal(row, col, first_positive, BLOCK_M, BLOCK_N)
    if IDS or (has_positive | (row + BLOCK_M > n) | (col + BLOCK_N > m)):
        i, j = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
        keep = (i < n)[:, None] & (j < m)[None, :]
        if MASK:
            keep = keep & (j[None, :] != i[:, None] + first_positive)
        l2 = tl.where(keep, l2, -float("inf"))
    if IDS:
        l2 = tl.where(same_group(row_ids, col_ids, row, col, n, m, BLOCK_M, BLOCK_N), -float("inf"), l2)
    if LIMITS:
        l2 = tl.where(above_limit(acc * scale2, row_limits, row, n, BLOCK_M), -float("inf"), l2)
    return l2


@triton.jit
def _exponentials(
    x,
    y,
    scale2,
    shift,
    row_ids,
    col_ids,
    row_limits,
    row_max,
    row_sum,
    col_max,
    stash,
    top,
    col,
    first_row,
    n,
    m,
    d,
    first_positive,
    pitch,
    MASK: tl.constexpr,
    IDS: tl.constexpr,
    LIMITS: tl.constexpr,
    COLS: tl.constexpr,
    MAX: tl.constexpr,
    STASH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """exp2(l2 - shift) of the tile at row `top` of the panel; writes its row sums and, where STASH, itself.

    Where MAX the largest l2 - shift of rows and columns too, before the exponentials take the registers.
    """
    l2 = _scores(x, y, first_row + top, col, scale2, shift, row_ids, col_ids, row_limits, n, m, d,
                 first_positive, MASK, IDS, LIMITS, BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION)  # fmt: skip
    i = top + tl.arange(0, BLOCK_M)
    if MAX:
        tl.store(row_max + i, tl.max(l2, 1), mask=first_row + i < n)
        if COLS:
            j = col + tl.arange(0, BLOCK_N)
            tl.store(col_max + j, tl.max(l2, 0), mask=j < m)
    e = tl.exp2(l2)
    tl.store(row_sum + i, tl.sum(e, 1), mask=first_row + i < n)
    if STASH:
        store_panel(stash, e, top, col, first_row, n, pitch, BLOCK_M, BLOCK_N, TMA)
    return e


@triton.jit(do_not_specialize=["strips", "strip_tiles"])  # more would spill registers
def dot_lse_scores_kernel(
    x, y, scale, mode, shift_log2, row_ids, col_ids, row_limits, row_max, row_sum, col_max, col_sum, stash, first_row,
    n, m, d, first_positive, panel, pitch, strips, strip_tiles,
    MASK: tl.constexpr, IDS: tl.constexpr, LIMITS: tl.constexpr, COLS: tl.constexpr, MAX: tl.constexpr,
    STASH: tl.constexpr, STRIPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of exp2(l2 - shift_log2) over tiles of rows [first_row, n) and all m columns, where mode is FIXED.

    row_sum (column tiles, panel) and col_sum (strips, m) get the sums of each tile; first_row + panel >= n.  row_max
    and col_max: where MAX, the largest l2 - shift_log2 likewise.  row_ids (n,) and col_ids (m,): where IDS.
    row_limits (n,), in nats: where LIMITS.
    stash: where STASH, the exponentials, (panel, pitch); zero at masked pairs.

    A program makes one tile or, where STRIPS (then no MAX, IDS or LIMITS), strip_tiles tiles below one another, adding
    them up before their rows: tcgen05 gives a thread one row of the tile, and adding up 128 threads costs more than the
    exponentials.  The tensor core, the loads and the epilogue then have their own warps, and the next tile is
    multiplied while one is summed.
    """
    if tl.load(mode) == FIXED:
        strip, col_tile = tl.program_id(0) % strips, tl.program_id(0) // strips
        scale2, shift = tl.load(scale) * LOG2E, tl.load(shift_log2)
        col = col_tile * BLOCK_N
        row_at = row_sum + col_tile.to(tl.int64) * panel
        if MAX:
            row_max += col_tile.to(tl.int64) * panel
            col_max += strip.to(tl.int64) * m
        if STRIPS:
            e = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            first = strip * strip_tiles * BLOCK_M
            last = tl.minimum(first + strip_tiles * BLOCK_M, n - first_row)
            for top in tl.range(first, last, BLOCK_M, warp_specialize=True):
                e += _exponentials(
                    x, y, scale2, shift, row_ids, col_ids, row_limits, row_max, row_at, col_max, stash, top, col,
                    first_row, n, m, d, first_positive, pitch, MASK, IDS, LIMITS, COLS, False, STASH, BLOCK_M, BLOCK_N,
                    BLOCK_K, TMA, PRECISION,
                )  # fmt: skip
        else:
            e = _exponentials(
                x, y, scale2, shift, row_ids, col_ids, row_limits, row_max, row_at, col_max, stash, strip * BLOCK_M,
                col, first_row, n, m, d, first_positive, pitch, MASK, IDS, LIMITS, COLS, MAX, STASH, BLOCK_M, BLOCK_N,
                BLOCK_K, TMA, PRECISION,
            )  # fmt: skip
        if COLS:
            j = col + tl.arange(0, BLOCK_N)
            tl.store(col_sum + strip.to(tl.int64) * m + j, tl.sum(e, 0), mask=j < m)


@triton.jit
def _shifted_sum(l2, axis: tl.constexpr):
    """(max, sum of exp2(l2 - max)) along an axis; (-inf, 0) where there is nothing."""
    top = tl.max(l2, axis)
    finite = tl.expand_dims(tl.where(top == -float("inf"), 0.0, top), axis)
    return top, tl.sum(tl.exp2(l2 - finite), axis)


@triton.jit
def _merge(top, total, other_top, other_total):
    """The (max, sum) of two."""
    new = tl.maximum(top, other_top)
    finite = tl.where(new == -float("inf"), 0.0, new)
    return new, total * tl.exp2(top - finite) + other_total * tl.exp2(other_top - finite)


@triton.jit(do_not_specialize=SIZES)
def dot_lse_online_scores_kernel(
    x,
    y,
    scale,
    mode,
    row_ids,
    col_ids,
    row_limits,
    row_max,
    row_sum,
    col_max,
    col_sum,
    first_row,
    n,
    m,
    d,
    first_positive,
    panel,
    strips,
    strip_tiles,
    MASK: tl.constexpr,
    IDS: tl.constexpr,
    LIMITS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dot_lse_scores_kernel where mode is ONLINE: sums of exp2(l2 - max), and the maxima, for each tile or strip.

    A program takes every num_programs-th strip, so that few programs suffice to find that nothing is wanted.
    """
    count = tl.where(tl.load(mode) == ONLINE, strips * tl.cdiv(m, BLOCK_N), 0)
    scale2 = tl.load(scale) * LOG2E
    for task in range(tl.program_id(0), count, tl.num_programs(0)):
        strip, col_tile = task % strips, task // strips
        col = col_tile * BLOCK_N
        j = col + tl.arange(0, BLOCK_N)
        col_top, col_total = tl.full((BLOCK_N,), -float("inf"), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
        first = strip * strip_tiles * BLOCK_M
        last = tl.minimum(first + strip_tiles * BLOCK_M, n - first_row)
        for top in range(first, last, BLOCK_M):
            row = first_row + top
            l2 = _scores(x, y, row, col, scale2, 0.0, row_ids, col_ids, row_limits, n, m, d, first_positive,
                         MASK, IDS, LIMITS, BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION)  # fmt: skip
            i = top + tl.arange(0, BLOCK_M)
            at = col_tile.to(tl.int64) * panel + i
            row_top, row_total = _shifted_sum(l2, 1)
            tl.store(row_max + at, row_top, mask=first_row + i < n)
            tl.store(row_sum + at, row_total, mask=first_row + i < n)
            if COLS:
                tile_top, tile_total = _shifted_sum(l2, 0)
                col_top, col_total = _merge(col_top, col_total, tile_top, tile_total)
        if COLS:
            tl.store(col_max + strip.to(tl.int64) * m + j, col_top, mask=j < m)
            tl.store(col_sum + strip.to(tl.int64) * m + j, col_total, mask=j < m)


@triton.jit
def _is_in_a_sum(asked, at, own_ids, other_ids, length, others, shift, MASK: tl.constexpr, IDS: tl.constexpr,
                 BLOCK_T: tl.constexpr):  # fmt: skip
    """Where asked: does a pair of row `at` and any of `others` columns take part in a sum?  Its positive is at + shift.

    With ids it looks at columns until all that asked have found one: all columns only for a row without any.
    """
    if IDS:
        found = asked == 0
        own = tl.load(own_ids + at, mask=at < length, other=0)[:, None]
        first = 0
        while (first < others) & (tl.min(found.to(tl.int32), 0) == 0):
            j = first + tl.arange(0, BLOCK_T)
            keep = own != tl.load(other_ids + j, mask=j < others, other=0)[None, :]
            keep = keep & (j < others)[None, :]
            if MASK:
                keep = keep & (j[None, :] != at[:, None] + shift)
            found = found | (tl.max(keep.to(tl.int32), 1) > 0)
            first += BLOCK_T
        asked = asked & found
    elif MASK:  # only a row whose one column is its positive has none
        asked = asked & ((others > 1) | (at + shift != 0))
    return asked


@triton.jit
def _finished(total, top, mode, state, shift_log2, own_ids, other_ids, at, inside, length, others, first_positive,
              WANTED: tl.constexpr, MASK: tl.constexpr, IDS: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    """-> log-sum-exps of sums, and their maxima, from units of log2 to nats, for rows `at` with `others` columns.

    WANTED = FIXED: where something underflowed it sets mode to ONLINE, and what it gives will be written again.
    WANTED = ONLINE: NaN if the mode is REFUSED.
    """
    if WANTED == FIXED:
        value, high = (tl.log2(total) + shift_log2) * LN2, (top + shift_log2) * LN2
        low = inside & (value < shift_log2 * LN2 - UNDERFLOW)
        if tl.sum(low.to(tl.int32), 0) > 0:  # underflowed, unless it is the sum of nothing, rightly -inf
            low = _is_in_a_sum(low, at, own_ids, other_ids, length, others, first_positive, MASK, IDS, BLOCK_T)
            if tl.sum(low.to(tl.int32), 0) > 0:
                tl.store(mode, ONLINE)  # every writer writes the same
    else:
        nothing = tl.where(state == ONLINE, 0.0, float("nan"))
        value, high = (tl.log2(total) + top) * LN2 + nothing, top * LN2 + nothing
    return value, high


@triton.jit
def fold(part_max, part_sum, out_max, out_sum, mode, state, shift_log2, own_ids, other_ids, start, block, tiles, count,
          pitch, fresh, last, length, others, first_positive, WANTED: tl.constexpr, MASK: tl.constexpr,
          IDS: tl.constexpr, MAX: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr):  # fmt: skip
    """out[l] = (0 if fresh else out[l]) + sum_t part[t, l] for one block of `count` l from `start` on; MAX: maxima too.

    WANTED = ONLINE: with maxima, which the sums are in units of.  Where it is the last to add, `_finished`.  -> out.
    """
    here = block * BLOCK_L + tl.arange(0, BLOCK_L)
    at = start + here
    inside = here < count
    old = inside & (fresh == 0)
    total = tl.load(out_sum + at, mask=old, other=0.0)
    top = tl.full((BLOCK_L,), -float("inf"), tl.float32)
    if MAX:
        top = tl.load(out_max + at, mask=old, other=-float("inf"))
    for first in range(0, tiles, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        mask = (t < tiles)[:, None] & inside[None, :]
        place = t.to(tl.int64)[:, None] * pitch + here[None, :]
        part = tl.load(part_sum + place, mask=mask, other=0.0)
        if MAX:
            height = tl.load(part_max + place, mask=mask, other=-float("inf"))
            highest = tl.max(height, 0)
        if WANTED == ONLINE:
            finite = tl.where(highest == -float("inf"), 0.0, highest)
            top, total = _merge(top, total, highest, tl.sum(part * tl.exp2(height - finite[None, :]), 0))
        else:
            total += tl.sum(part, 0)
            if MAX:
                top = tl.maximum(top, highest)
    if last:
        total, top = _finished(
            tl.where(inside, total, 1.0), tl.where(inside, top, 0.0), mode, state, shift_log2, own_ids, other_ids, at,
            inside, length, others, first_positive, WANTED, MASK, IDS, BLOCK_T,
        )  # fmt: skip
    tl.store(out_sum + at, total, mask=inside)
    if MAX:
        tl.store(out_max + at, top, mask=inside)
    return total


@triton.jit(do_not_specialize=SIZES)
def dot_lse_fold_kernel(
    mode, shift_log2, part_row_max, part_row_sum, part_col_max, part_col_sum, row_ids, col_ids, row_max, row_sum,
    col_max, col_sum, positives, stash_shift, first_row, rows, n, m, panel, strips, col_tiles, first_positive,
    row_blocks, WANTED: tl.constexpr, MASK: tl.constexpr, IDS: tl.constexpr, MAX: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One panel's sums of tiles into row_sum[first_row:] (n,) and, added to the panels before, col_sum (m,).

    Rows at once, columns with the last panel, become log-sum-exps; where MAX the maxima too, in nats (in the online
    mode they always are there).  The launch of the online mode has the last word: stash_shift, and NaN everywhere if
    the mode is REFUSED.
    """
    pid = tl.program_id(0)
    state, shift = tl.load(mode), tl.load(shift_log2)
    if (WANTED == ONLINE) & (pid == 0):
        tl.store(stash_shift, tl.where(state == FIXED, shift * LN2, float("nan")))
    if (state == FIXED) == (WANTED == FIXED):
        refused = state == REFUSED
        if pid < row_blocks:
            if refused:
                at = pid * BLOCK_L + tl.arange(0, BLOCK_L)
                tl.store(positives + first_row + at, float("nan") + tl.zeros((BLOCK_L,), tl.float32), mask=at < rows)
            fold(part_row_max, part_row_sum, row_max, row_sum, mode, state, shift, row_ids, col_ids, first_row, pid,
                  tl.where(refused, 0, col_tiles), rows, panel, 1, True, n, m, first_positive,
                  WANTED, MASK, IDS, MAX, BLOCK_T, BLOCK_L)  # fmt: skip
        else:
            fold(part_col_max, part_col_sum, col_max, col_sum, mode, state, shift, col_ids, row_ids, 0,
                  pid - row_blocks, tl.where(refused, 0, strips), m, m, first_row == 0, first_row + rows == n, m, n,
                  -first_positive, WANTED, MASK, IDS, MAX, BLOCK_T, BLOCK_L)  # fmt: skip
