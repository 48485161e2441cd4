"""The Triton kernels of additive_moments' backward: the gradients of L, which the forward made, and the positives of J.

Several critics are a group: every tensor has one part for each, one after the other; a grid's last axis is the group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cibr_kernels.dispatch.triton_call import SIZES
from cibr_kernels.primitives.additive.triton_activations import value_and_slope


@triton.jit(do_not_specialize=SIZES)
def additive_moments_positives_kernel(
    a,
    b,
    w,
    g_j,
    g_l,
    da_of_l,
    db_of_l,
    da,
    db,
    partials,
    n,
    m,
    first_positive,
    width,
    slope,
    ACTIVATION: tl.constexpr,
    HAS_J: tl.constexpr,
    HAS_L: tl.constexpr,
    NEED_A: tl.constexpr,
    NEED_B: tl.constexpr,
    NEED_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """da = g_l da_of_l + (g_j / n) w phi'(t) for the positives t_i = a_i + b_first_positive+i, and db likewise.

    A positive has one row of a and one of b: the program of the row of b writes both.  partials (blocks, h): the
    sum of phi.  Grid: (blocks of rows of b, blocks of h, groups).
    """
    group = tl.program_id(2).to(tl.int64)
    j = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = j - first_positive
    inside = (j < m)[:, None] & (k < width)[None, :]
    positive = inside & ((i >= 0) & (i < n))[:, None]
    at_a = (group * n + i.to(tl.int64))[:, None] * width + k[None, :]
    at_b = (group * m + j.to(tl.int64))[:, None] * width + k[None, :]
    t = tl.load(a + at_a, mask=positive, other=0.0).to(tl.float32)
    t += tl.load(b + at_b, mask=positive, other=0.0).to(tl.float32)
    value, derivative = value_and_slope(t, slope, ACTIVATION)
    of_j = tl.load(g_j + group) / n if HAS_J else 0.0
    of_l = tl.load(g_l + group) if HAS_L else 0.0
    weight = tl.load(w + group * width + k, mask=k < width, other=0.0).to(tl.float32) * of_j
    added = tl.where(positive, derivative * weight[None, :], 0.0)
    if NEED_A:
        here = tl.load(da_of_l + at_a, mask=positive, other=0.0).to(tl.float32) * of_l + added
        tl.store(da + at_a, here.to(da.dtype.element_ty), mask=positive)
    if NEED_B:
        here = tl.load(db_of_l + at_b, mask=inside, other=0.0).to(tl.float32) * of_l + added
        tl.store(db + at_b, here.to(db.dtype.element_ty), mask=inside)
    if NEED_W:
        partial = partials + (group * tl.num_programs(0) + tl.program_id(0)) * width + k
        tl.store(partial, tl.sum(tl.where(positive, value, 0.0), 0), mask=k < width)


@triton.jit(do_not_specialize=SIZES)
def additive_moments_positive_weights_kernel(
    partials,
    g_j,
    g_l,
    dw_of_l,
    dw,
    n,
    blocks,
    width,
    HAS_J: tl.constexpr,
    HAS_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dw (h,) = g_l dw_of_l + (g_j / n) times the sum of partials (blocks, h).  Grid: (blocks of h, groups)."""
    group = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    partials += group * blocks * width
    total = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    for at in range(0, blocks, BLOCK_R):
        r = at + tl.arange(0, BLOCK_R)
        inside = (r < blocks)[:, None] & (k < width)[None, :]
        total += tl.load(partials + r.to(tl.int64)[:, None] * width + k[None, :], mask=inside, other=0.0)
    of_j = tl.load(g_j + group) / n if HAS_J else 0.0
    of_l = tl.load(g_l + group) if HAS_L else 0.0
    at = group * width + k
    old = tl.load(dw_of_l + at, mask=k < width, other=0.0).to(tl.float32)
    tl.store(dw + at, (old * of_l + tl.sum(total, 0) * of_j).to(dw.dtype.element_ty), mask=k < width)
