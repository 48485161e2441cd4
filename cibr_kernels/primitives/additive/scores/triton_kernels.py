"""The Triton kernels of additive_scores: pack and scores; spread and state, which feed a gradient to additive_moments'.

Buffers are padded with 0 to whole tiles, so that the inner loop has no masks.  A number that is not finite would vanish
in max(t, 0): its row is poisoned instead, by a sum of 0 x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cibr_kernels.dispatch.triton_call import SIZES
from cibr_kernels.primitives.additive.triton_activations import value_and_slope


@triton.jit
def _pack(x, w, packed, poison, rows, width, rows_padded, block, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr):
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    wrong = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    for at in range(0, width, BLOCK_H):
        k = at + tl.arange(0, BLOCK_H)
        inside = (r < rows)[:, None] & (k < width)[None, :]
        v = tl.load(x + r.to(tl.int64)[:, None] * width + k[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(packed + k.to(tl.int64)[None, :] * rows_padded + r[:, None], v)
        weight = tl.load(w + k, mask=k < width, other=0.0).to(tl.float32)
        wrong += v * 0.0 + (weight * 0.0)[None, :]
    tl.store(poison + r, tl.sum(wrong, 1))


@triton.jit(do_not_specialize=SIZES)
def additive_scores_pack_kernel(
    a, b, w, a_packed, b_packed, w_packed, poison, n, m, width, n_padded, m_padded, BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """a (n, h), b (m, h), w (h,) -> their transposes (h padded, rows padded) and w, float32.

    poison (n padded + m padded,): 0, or NaN for a row that is not finite; all NaN where w is not.
    Grid: (blocks of rows of a, then of b,).
    """
    block = tl.program_id(0)
    blocks_a = n_padded // BLOCK_R
    if block < blocks_a:
        _pack(a, w, a_packed, poison, n, width, n_padded, block, BLOCK_R, BLOCK_H)
    else:
        _pack(b, w, b_packed, poison + n_padded, m, width, m_padded, block - blocks_a, BLOCK_R, BLOCK_H)
    if block == 0:
        for at in range(0, width, BLOCK_H):
            k = at + tl.arange(0, BLOCK_H)
            tl.store(w_packed + k, tl.load(w + k, mask=k < width, other=0.0).to(tl.float32))


@triton.jit(do_not_specialize=SIZES)
def additive_scores_forward_kernel(
    a_packed, b_packed, w_packed, poison, out, n, m, width_padded, n_padded, m_padded, slope, ACTIVATION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, UNROLL: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out (n, m) = S, one tile of pairs.  Grid: (tiles,), GROUP rows of tiles at a time (cache)."""
    tiles_j = tl.cdiv(m, BLOCK_J)
    tile = tl.program_id(0)
    group = tile // (GROUP * tiles_j)
    height = tl.minimum(tl.cdiv(n, BLOCK_I) - group * GROUP, GROUP)
    within = tile - group * GROUP * tiles_j
    i = (group * GROUP + within % height) * BLOCK_I + tl.arange(0, BLOCK_I)
    j = within // height * BLOCK_J + tl.arange(0, BLOCK_J)
    # A load, because a load is what gives a thread four neighbouring columns; arithmetic alone would scatter them.
    acc = tl.load(poison + n_padded + tl.zeros_like(i)[:, None] + j[None, :])
    acc += tl.load(poison + i)[:, None]
    for _ in range(0, width_padded, UNROLL):
        for u in tl.static_range(UNROLL):
            t = tl.load(a_packed + u * n_padded + i)[:, None] + tl.load(b_packed + u * m_padded + j)[None, :]
            acc += tl.load(w_packed + u) * value_and_slope(t, slope, ACTIVATION)[0]
        a_packed += UNROLL * n_padded
        b_packed += UNROLL * m_padded
        w_packed += UNROLL
    tl.store(out + i.to(tl.int64)[:, None] * m + j[None, :], acc, mask=(i < n)[:, None] & (j < m)[None, :])


@triton.jit(do_not_specialize=SIZES)
def additive_scores_spread_kernel(
    grad, s, s_transposed, wrong, rows, m, rows_padded, m_padded, KEEP: tl.constexpr, TRANSPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """grad (rows, m) -> s (rows padded, m padded) and its transpose.  wrong (programs,): NaN for a tile not finite.

    Grid: tiles of BLOCK x BLOCK.
    """
    tiles_j = m_padded // BLOCK
    i = tl.program_id(0) // tiles_j * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(0) % tiles_j * BLOCK + tl.arange(0, BLOCK)
    inside = (i < rows)[:, None] & (j < m)[None, :]
    g = tl.load(grad + i.to(tl.int64)[:, None] * m + j[None, :], mask=inside, other=0.0)
    if KEEP:
        tl.store(s + i.to(tl.int64)[:, None] * m_padded + j[None, :], g)
    if TRANSPOSE:
        tl.store(s_transposed + j.to(tl.int64)[None, :] * rows_padded + i[:, None], g)
    tl.store(wrong + tl.program_id(0), tl.sum(tl.sum(g * 0.0, 1), 0))


@triton.jit(do_not_specialize=SIZES)
def additive_scores_state_kernel(wrong, wrongs, bad, bads, w, width, total, BLOCK: tl.constexpr):
    """total () = 1, or NaN: what additive_moments' gradients are divided by.  Grid: (1,).

    wrong (wrongs,): 0 or NaN of the gradient's tiles; bad (bads,): how many of a and b are not finite; w (width,).
    """
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, wrongs, BLOCK):
        sums += tl.load(wrong + at + lane, mask=at + lane < wrongs, other=0.0)
    for at in range(0, bads, BLOCK):
        sums += tl.where(tl.load(bad + at + lane, mask=at + lane < bads, other=0) > 0, float("nan"), 0.0)
    for at in range(0, width, BLOCK):
        sums += tl.load(w + at + lane, mask=at + lane < width, other=0.0) * 0.0
    tl.store(total, 1.0 + tl.sum(sums, 0))
