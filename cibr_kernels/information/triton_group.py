"""The Triton kernels around a group of concat critics: what is neither a matmul nor a sum over pairs.

Tensors of a group have one part for each critic, one after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cibr_kernels.dispatch.triton_call import SIZES


@triton.jit(do_not_specialize=SIZES)
def critic_parameters_kernel(c, w, bias, b, ws, biases, n, width, first, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr):
    """Of critic `first`: b (n, h) = c in every row, ws (h,) = w, biases () = bias.  Grid: (blocks of rows, of h)."""
    group = first.to(tl.int64)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (r < n)[:, None] & (k < width)[None, :]
    start = tl.load(c + k, mask=k < width, other=0.0)
    rows = (group * n + r.to(tl.int64))[:, None] * width + k[None, :]
    tl.store(b + rows, tl.zeros((BLOCK_R, BLOCK_H), tl.float32) + start[None, :], mask=inside)
    if tl.program_id(0) == 0:
        tl.store(ws + group * width + k, tl.load(w + k, mask=k < width, other=0.0), mask=k < width)
        if tl.program_id(1) == 0:
            tl.store(biases + group, tl.load(bias))


@triton.jit(do_not_specialize=SIZES)
def critic_column_sums_kernel(
    db,
    g_j,
    g_l,
    partials,
    dbias,
    n,
    width,
    HAS_J: tl.constexpr,
    HAS_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """partials (blocks, h): sums of BLOCK_R rows of db (n, h).  dbias () = g_j + g_l.  Grid: (blocks, of h, groups)."""
    group = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (r < n)[:, None] & (k < width)[None, :]
    here = tl.load(db + (group * n + r.to(tl.int64))[:, None] * width + k[None, :], mask=inside, other=0.0)
    tl.store(partials + (group * tl.num_programs(0) + tl.program_id(0)) * width + k, tl.sum(here, 0), mask=k < width)
    if tl.program_id(0) + tl.program_id(1) == 0:
        of_j = tl.load(g_j + group) if HAS_J else 0.0
        of_l = tl.load(g_l + group) if HAS_L else 0.0
        tl.store(dbias + group, of_j + of_l)
