"""The Triton kernels of additive_shifts: scores, gradient (of a, or of b), and the reduction of dw's partial sums."""

from __future__ import annotations

import triton
import triton.language as tl

from cibr_kernels.primitives.additive.triton_activations import value_and_slope
from cibr_kernels.primitives.triton_sums import sums_reduce_kernel as sums_reduce_kernel


@triton.jit
def additive_shifts_scores_kernel(
    a, b, w, out, n, m, width, first, slope, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr
):
    """out (k, n): w . phi(a_i + b_j), j = (i + first + r) mod m.  Grid: (blocks of rows, k): one r each."""
    r = tl.program_id(1)
    i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = (i + (first + r) % m) % m
    lane = tl.arange(0, BLOCK_H)
    acc = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    row_a, row_b = i.to(tl.int64)[:, None] * width, j.to(tl.int64)[:, None] * width
    for start in range(0, width, BLOCK_H):
        k = start + lane
        inside = (i < n)[:, None] & (k < width)[None, :]
        t = tl.load(a + row_a + k[None, :], mask=inside, other=0.0).to(tl.float32)
        t += tl.load(b + row_b + k[None, :], mask=inside, other=0.0).to(tl.float32)
        value = value_and_slope(t, slope, ACTIVATION)[0]
        value = tl.where(t == t, value, t)  # max(NaN, 0) is 0 here; PyTorch's is NaN
        acc += tl.load(w + k, mask=k < width, other=0.0).to(tl.float32)[None, :] * value
    tl.store(out + r.to(tl.int64) * n + i, tl.sum(acc, 1), mask=i < n)


@triton.jit
def additive_shifts_gradient_kernel(
    x,
    y,
    w,
    grad,
    dx,
    partials,
    rows,
    others,
    n,
    m,
    width,
    first,
    shifts,
    slope,
    OF_B: tl.constexpr,
    WEIGHTS: tl.constexpr,
    STORE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dx = w * sum_r g phi'(x + y) over the shifts r: of a (x = a, y = b), or OF_B (x = b, y = a), by its rows' owner.

    grad (shifts, n).  WEIGHTS: partials (blocks of rows, h) = sum g phi(x + y).  Grid: (blocks of rows, blocks of h).
    """
    own = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (own < rows)[:, None] & (k < width)[None, :]
    place = own.to(tl.int64)[:, None] * width + k[None, :]
    here = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    weights = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    for r in range(0, shifts):
        by = (first + r) % m
        other = (own + (m - by)) % m if OF_B else (own + by) % m
        met = (own < rows) & (other < others)  # rows of b that no row of a meets, where b is longer
        g = tl.load(grad + tl.cast(r, tl.int64) * n + (other if OF_B else own), mask=met, other=0.0)
        both = met[:, None] & (k < width)[None, :]
        there = tl.load(y + other.to(tl.int64)[:, None] * width + k[None, :], mask=both, other=0.0).to(tl.float32)
        value, derivative = value_and_slope(here + there, slope, ACTIVATION)
        acc += tl.where(met[:, None], g[:, None] * derivative, 0.0)
        if WEIGHTS:
            weights += tl.where(met[:, None], g[:, None] * value, 0.0)
    if STORE:
        acc *= tl.load(w + k, mask=k < width, other=0.0).to(tl.float32)[None, :]
        tl.store(dx + place, acc.to(dx.dtype.element_ty), mask=inside)
    if WEIGHTS:
        tl.store(partials + tl.program_id(0).to(tl.int64) * width + k, tl.sum(weights, 0), mask=k < width)
