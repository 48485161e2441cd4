"""The Triton kernels of additive_moments: pack, scores, merge, weigh, gradient, finish, reduce.

`a` (n, h) and `b` (m, h) are the projections; rows come in panels, so that the pairs' exponentials e stay within a
budget.  One sweep: panel p leaves top_p, the largest S so far, and total_p = sum e^(S - top_p); its gradients are
summed in units of e^top_p, and scaled by e^(top_p - top) / total when the last panel has been merged.

No sum is atomic: partial sums go to buffers and are added in a fixed order.  Buffers are padded to whole tiles, packed
features with 0 and scores with -inf, so that the inner loops have no masks.

Several critics are a group: every buffer has one part for each, one after the other; a grid's last axis is the group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cibr_kernels.dispatch.triton_call import SIZES
from cibr_kernels.primitives.additive.triton_activations import value_and_slope
from cibr_kernels.primitives.triton_sums import sums_reduce_kernel as sums_reduce_kernel


@triton.jit
def _pack(
    x, packed, zeros, bad, typical, rows, width, rows_padded, block, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr
):
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (r < rows)[:, None] & (k < width)[None, :]
    v = tl.load(x + r.to(tl.int64)[:, None] * width + k[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(packed + k.to(tl.int64)[None, :] * rows_padded + r[:, None], v)
    tl.store(zeros + r, tl.zeros_like(r).to(tl.float32))
    strange = tl.where(tl.abs(v) < float("inf"), 0, 1)
    tl.store(bad, tl.sum(tl.sum(strange, 1), 0))
    if block == 0:
        tl.store(typical + k, tl.sum(v, 0) / tl.minimum(rows, BLOCK_R))


@triton.jit(do_not_specialize=SIZES)
def additive_moments_pack_kernel(
    a, b, w, a_packed, b_packed, w_packed, zeros, bad, typical, n, m, width, n_padded, m_padded,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """a (n, h), b (m, h), w (h,) -> their transposes (h padded, rows padded) and w, float32.

    bad counts numbers that are not finite, per program; typical (2, h padded) is a mean of some rows of a and of b.
    Grid: (blocks of rows of a, then of b; blocks of h; groups).
    """
    block = tl.program_id(0)
    group = tl.program_id(2).to(tl.int64)
    width_padded = tl.num_programs(1) * BLOCK_H
    a += group * n * width
    b += group * m * width
    w += group * width
    a_packed += group * width_padded * n_padded
    b_packed += group * width_padded * m_padded
    w_packed += group * width_padded
    typical += group * 2 * width_padded
    bad += group * tl.num_programs(0) * tl.num_programs(1)
    blocks_a = n_padded // BLOCK_R
    k = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    bad += block * tl.num_programs(1) + tl.program_id(1)
    if block < blocks_a:
        _pack(a, a_packed, zeros, bad, typical, n, width, n_padded, block, BLOCK_R, BLOCK_H)
    else:
        typical += width_padded
        _pack(b, b_packed, zeros, bad, typical, m, width, m_padded, block - blocks_a, BLOCK_R, BLOCK_H)
    if block == 0:
        tl.store(w_packed + k, tl.load(w + k, mask=k < width, other=0.0).to(tl.float32))


@triton.jit(do_not_specialize=SIZES)
def additive_moments_scores_kernel(
    a_packed,
    b_packed,
    w_packed,
    zeros,
    s,
    positives,
    tops,
    totals,
    first,
    end,
    m,
    first_positive,
    n,
    width_padded,
    width_packed,
    n_padded,
    m_padded,
    s_group,
    slope,
    ACTIVATION: tl.constexpr,
    INCLUDE: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    UNROLL: tl.constexpr,
    GROUP: tl.constexpr,
):
    """S of one tile of pairs; its largest score, its sum of exponentials, its positives, and S itself if KEEP.

    Rows first ... end - 1 of a; s (rows padded, m padded), the next group's s_group further.  Features 0 ...
    width_padded - 1 of width_packed.  Grid: (tiles, groups), GROUP rows of tiles at a time (cache).
    """
    member = tl.program_id(1).to(tl.int64)
    a_packed += member * width_packed * n_padded
    b_packed += member * width_packed * m_padded
    w_packed += member * width_packed
    positives += member * n
    tops += member * tl.num_programs(0)
    totals += member * tl.num_programs(0)
    tiles_j = tl.cdiv(m, BLOCK_J)
    tiles_i = tl.cdiv(end - first, BLOCK_I)
    tile = tl.program_id(0)
    group = tile // (GROUP * tiles_j)
    height = tl.minimum(tiles_i - group * GROUP, GROUP)
    within = tile - group * GROUP * tiles_j
    ti = group * GROUP + within % height
    tj = within // height
    local = ti * BLOCK_I + tl.arange(0, BLOCK_I)
    i = first + local
    j = tj * BLOCK_J + tl.arange(0, BLOCK_J)
    # A load, because a load is what gives a thread four neighbouring columns; arithmetic alone would scatter them.
    acc = tl.load(zeros + tl.zeros_like(i)[:, None] + j[None, :])
    for _ in range(0, width_padded, UNROLL):
        for u in tl.static_range(UNROLL):
            t = tl.load(a_packed + u * n_padded + i)[:, None] + tl.load(b_packed + u * m_padded + j)[None, :]
            acc += tl.load(w_packed + u) * value_and_slope(t, slope, ACTIVATION)[0]
        a_packed += UNROLL * n_padded
        b_packed += UNROLL * m_padded
        w_packed += UNROLL
    positive = (i + first_positive)[:, None] == j[None, :]
    inside = (i < end)[:, None] & (j < m)[None, :]
    tl.store(positives + i[:, None] + tl.zeros_like(j)[None, :], acc, mask=inside & positive)
    if not INCLUDE:
        inside = inside & (positive == 0)
    acc = tl.where(inside, acc, float("-inf"))
    top = tl.max(tl.max(acc, 1), 0)
    shift = tl.where(top == float("-inf"), 0.0, top)  # a tile without a pair
    tl.store(tops + tile, top)
    tl.store(totals + tile, tl.sum(tl.sum(tl.exp(acc - shift), 1), 0))
    if KEEP:
        tl.store(s + member * s_group + local.to(tl.int64)[:, None] * m_padded + j[None, :], acc)


@triton.jit(do_not_specialize=SIZES)
def additive_moments_merge_kernel(
    tops, totals, run, panel, panels, tiles, positives, n, bad, bads, bias, j, el, log_pairs, LAST: tl.constexpr,
    BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds a panel's tiles to the running top and total: run (panels + 1, 2), from row 1 on.  Grid: (groups,).

    The LAST one writes J and L, with the bias if there is one.  A number that was not finite makes the total NaN, which
    reaches every output.
    """
    group = tl.program_id(0).to(tl.int64)
    tops += group * tiles
    totals += group * tiles
    run += group * 2 * (panels + 1)
    positives += group * n
    bad += group * bads
    lane = tl.arange(0, BLOCK)
    before = tl.load(run + 2 * panel, mask=panel > 0, other=float("-inf"))
    total = tl.load(run + 2 * panel + 1, mask=panel > 0, other=0.0)
    highest = tl.zeros((BLOCK,), tl.float32) + before
    for at in range(0, tiles, BLOCK):
        highest = tl.maximum(highest, tl.load(tops + at + lane, mask=at + lane < tiles, other=float("-inf")))
    top = tl.max(highest, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    sums = tl.where(lane == 0, total * tl.exp(before - shift), 0.0)
    for at in range(0, tiles, BLOCK):
        inside = at + lane < tiles
        here = tl.load(tops + at + lane, mask=inside, other=float("-inf"))
        sums += tl.load(totals + at + lane, mask=inside, other=0.0) * tl.exp(here - shift)
    total = tl.sum(sums, 0)
    if LAST:
        wrong = tl.zeros((BLOCK,), tl.int32)
        for at in range(0, bads, BLOCK):
            wrong += tl.minimum(tl.load(bad + at + lane, mask=at + lane < bads, other=0), 1)
        poison = tl.where(tl.sum(wrong, 0) > 0, float("nan"), 0.0)
        total += poison
        positive = tl.zeros((BLOCK,), tl.float32)
        for at in range(0, n, BLOCK):
            positive += tl.load(positives + at + lane, mask=at + lane < n, other=0.0)
        mean, log_mean = tl.sum(positive, 0) / n + poison, top + tl.log(total) - log_pairs
        if BIAS:
            constant = tl.load(bias + group)
            mean, log_mean = mean + constant, log_mean + constant
        tl.store(j + group, mean)
        tl.store(el + group, log_mean)
    tl.store(run + 2 * panel + 2, top)
    tl.store(run + 2 * panel + 3, total)


@triton.jit(do_not_specialize=SIZES)
def additive_moments_weigh_kernel(
    s, s_transposed, run, panel, panels, rows_padded, m_padded, s_group, KEEP: tl.constexpr, TRANSPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """s (rows padded, m padded) -> e^(s - top), in its place and as the transpose.

    Grid: (tiles of BLOCK x BLOCK, groups), a group's s_group after the one before.
    """
    group = tl.program_id(1).to(tl.int64)
    s += group * s_group
    s_transposed += group * s_group
    run += group * 2 * (panels + 1)
    tiles_j = m_padded // BLOCK
    i = tl.program_id(0) // tiles_j * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(0) % tiles_j * BLOCK + tl.arange(0, BLOCK)
    place = s + i.to(tl.int64)[:, None] * m_padded + j[None, :]
    top = tl.load(run + 2 * panel + 2)
    e = tl.exp(tl.load(place) - tl.where(top == float("-inf"), 0.0, top))
    if KEEP:
        tl.store(place, e)
    if TRANSPOSE:
        tl.store(s_transposed + j.to(tl.int64)[None, :] * rows_padded + i[:, None], e)


@triton.jit(do_not_specialize=SIZES)
def additive_moments_gradient_kernel(
    x, y, e, u, uw, run, panel, panels, rows, first_block, others, stride, x_rows, y_rows, s_group, u_stride, uw_rows,
    width, slope, ACTIVATION: tl.constexpr, ADD: tl.constexpr, WEIGHTS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """u_rh = sum_o e_or phi'(x_rh + y_oh) for the rows r of x (rows, h) over the rows o of y (others, h).

    e (others padded, stride) has r contiguous.  u (SPLITS, rows, h), u_stride from split to split; ADD: on top of the
    panels before, in this panel's unit.  WEIGHTS: uw (blocks, SPLITS, h), from block first_block on, =
    sum_ro e_or phi(x_rh + y_oh).
    Grid: (blocks of rows, blocks of h, groups of SPLITS); a split takes every SPLITS-th run of UNROLL others.  x, y
    and uw have x_rows, y_rows and uw_rows rows of each group, e has s_group numbers.
    """
    block = tl.program_id(0)
    split = tl.program_id(2) % SPLITS
    group = (tl.program_id(2) // SPLITS).to(tl.int64)
    x += group * x_rows * width
    y += group * y_rows * width
    e += group * s_group
    u += group * SPLITS * u_stride
    uw += group * uw_rows * width
    run += group * 2 * (panels + 1)
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (r < rows)[:, None] & (k < width)[None, :]
    own = tl.load(x + r.to(tl.int64)[:, None] * width + k[None, :], mask=inside, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    weights = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    e += r
    y += k
    for run_of in range(split * UNROLL, others, SPLITS * UNROLL):
        for o in tl.static_range(UNROLL):
            other = tl.load(y + tl.minimum(run_of + o, others - 1).to(tl.int64) * width, mask=k < width, other=0.0)
            other = other.to(tl.float32)[None, :]
            mass = tl.load(e + (run_of + o).to(tl.int64) * stride)[:, None]
            if ACTIVATION == "relu":
                acc = tl.where(own > -other, acc + mass, acc)
            elif ACTIVATION == "leaky_relu":
                acc += tl.where(own > -other, mass, slope * mass)
            else:
                value, derivative = value_and_slope(own + other, slope, ACTIVATION)
                acc += mass * derivative
                if WEIGHTS:
                    weights += mass * value
    place = u + split.to(tl.int64) * u_stride + r.to(tl.int64)[:, None] * width + k[None, :]
    if ADD:
        acc += tl.load(place, mask=inside, other=0.0) * tl.exp(tl.load(run + 2 * panel) - tl.load(run + 2 * panel + 2))
    tl.store(place, acc, mask=inside)
    if WEIGHTS:
        partial = uw + ((first_block + block) * SPLITS + split).to(tl.int64) * width + k
        tl.store(partial, tl.sum(weights, 0), mask=k < width)


@triton.jit
def _finish(
    x, u, uw, g, partial, w_packed, centre, scale, rows, width, block, SPLITS: tl.constexpr, NEED: tl.constexpr,
    FREE_WEIGHTS: tl.constexpr, OWN_WEIGHTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (r < rows)[:, None] & (k < width)[None, :]
    place = r.to(tl.int64)[:, None] * width + k[None, :]
    if NEED or FREE_WEIGHTS:
        total = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
        for split in tl.static_range(SPLITS):
            total += tl.load(u + split * tl.cast(rows, tl.int64) * width + place, mask=inside, other=0.0)
        total *= scale
        if NEED:
            tl.store(g + place, (total * tl.load(w_packed + k)[None, :]).to(g.dtype.element_ty), mask=inside)
        if FREE_WEIGHTS:
            own = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) + centre[None, :]
            tl.store(partial, tl.sum(tl.where(inside, own * total, 0.0), 0), mask=k < width)
    if OWN_WEIGHTS:
        total_w = tl.zeros((BLOCK_H,), tl.float32)
        for split in tl.static_range(SPLITS):
            total_w += tl.load(uw + (block * SPLITS + split).to(tl.int64) * width + k, mask=k < width, other=0.0)
        tl.store(partial, total_w * scale, mask=k < width)


@triton.jit(do_not_specialize=SIZES)
def additive_moments_finish_kernel(
    a, b, ua, ub, uw, da, db, partials, w_packed, typical, run, panels, panel_rows, n, m, width, width_padded,
    uw_rows, SPLITS_A: tl.constexpr, SPLITS_B: tl.constexpr, SIDE_A: tl.constexpr, NEED_A: tl.constexpr,
    NEED_B: tl.constexpr, FREE_WEIGHTS: tl.constexpr, OWN_WEIGHTS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """da = w U, db = w V in their dtypes, and partials (blocks of a, then of b; h) of dw.

    FREE_WEIGHTS: phi(t) = t phi'(t), so dw_h = sum_i (a_ih + c_h) U_ih + sum_j (b_jh - c_h) V_jh for any c; one that
    makes both small keeps the digits where a and b are large and cancel.  OWN_WEIGHTS: dw from uw, in the blocks of a.
    Grid: (blocks of rows of a if SIDE_A, then of b; blocks of h; groups).
    """
    block = tl.program_id(0)
    group = tl.program_id(2).to(tl.int64)
    a += group * n * width
    b += group * m * width
    da += group * n * width
    db += group * m * width
    ua += group * SPLITS_A * n * width
    ub += group * SPLITS_B * m * width
    uw += group * uw_rows * width
    w_packed += group * width_padded
    typical += group * 2 * width_padded
    run += group * 2 * (panels + 1)
    blocks_a = tl.cdiv(n, BLOCK_R) if SIDE_A else 0
    partials += group * (blocks_a if OWN_WEIGHTS else tl.num_programs(0)) * width
    k = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    centre = (tl.load(typical + width_padded + k) - tl.load(typical + k)) * 0.5
    top = tl.load(run + 2 * panels)
    scale = 1.0 / tl.load(run + 2 * panels + 1)
    partial = partials + block.to(tl.int64) * width + k
    if block < blocks_a:
        scale *= tl.exp(tl.load(run + 2 * (block * BLOCK_R // panel_rows) + 2) - top)
        _finish(
            a, ua, uw, da, partial, w_packed, centre, scale, n, width, block, SPLITS_A, NEED_A, FREE_WEIGHTS,
            OWN_WEIGHTS, BLOCK_R, BLOCK_H,
        )  # fmt: skip
    else:
        _finish(
            b, ub, uw, db, partial, w_packed, -centre, scale, m, width, block - blocks_a, SPLITS_B, NEED_B,
            FREE_WEIGHTS, False, BLOCK_R, BLOCK_H,
        )  # fmt: skip
