"""The Triton kernels of log_mean_exp: pieces, merge, backward.  `mask` is read as bytes, and only if MASKED."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _scores(scores, mask, at, count, MASKED: tl.constexpr):
    """float32 scores at `at`, -inf where nothing takes part; which take part."""
    inside = at < count
    if MASKED:
        inside = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    return tl.load(scores + at, mask=inside, other=float("-inf")).to(tl.float32), inside


@triton.jit
def _finite_or_zero(top):
    """An infinite maximum is no shift: e^(inf - inf) would be NaN where the sum is inf, or empty."""
    return tl.where(tl.abs(top) == float("inf"), 0.0, top)


@triton.jit
def log_mean_exp_pieces_kernel(scores, mask, tops, sums, pairs, count, MASKED: tl.constexpr, PIECE: tl.constexpr):
    """Largest score, sum of e^(s - largest) and number of pairs of one piece.  Grid: (pieces,)."""
    piece = tl.program_id(0)
    at = piece.to(tl.int64) * PIECE + tl.arange(0, PIECE)
    s, inside = _scores(scores, mask, at, count, MASKED)
    top = tl.max(s, 0)
    tl.store(tops + piece, top)
    tl.store(sums + piece, tl.sum(tl.exp(s - _finite_or_zero(top)), 0))
    if MASKED:
        tl.store(pairs + piece, tl.sum(inside.to(tl.int32), 0))
    else:
        tl.store(pairs + piece, tl.minimum(count - piece.to(tl.int64) * PIECE, PIECE).to(tl.int32))


@triton.jit
def log_mean_exp_merge_kernel(tops, sums, pairs, el, number, BLOCK: tl.constexpr):
    """L from the pieces, in a fixed order.  Grid: (1,)."""
    lane = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, number, BLOCK):
        highest = tl.maximum(highest, tl.load(tops + first + lane, mask=first + lane < number, other=float("-inf")))
    top = _finite_or_zero(tl.max(highest, 0))
    total = tl.zeros((BLOCK,), tl.float32)
    counted = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, number, BLOCK):
        inside = first + lane < number
        here = tl.load(tops + first + lane, mask=inside, other=float("-inf"))
        mass = tl.load(sums + first + lane, mask=inside, other=0.0)
        factor = tl.where(here == float("-inf"), 1.0, tl.exp(_finite_or_zero(here) - top))  # nothing, or NaN: as it is
        total += mass * factor
        counted += tl.load(pairs + first + lane, mask=inside, other=0)
    count = tl.sum(counted, 0).to(tl.float32)
    tl.store(el, top + tl.log(tl.sum(total, 0)) - tl.log(count))


@triton.jit
def log_mean_exp_backward_kernel(
    grad, scores, mask, el, pairs, dscores, count, MASKED: tl.constexpr, BLOCK: tl.constexpr
):
    """dscores = e^(s - L) grad / |P|, 0 where nothing takes part.  pairs: |P|, 0-d.  Grid: (blocks,)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s, inside = _scores(scores, mask, at, count, MASKED)
    number = tl.load(pairs).to(tl.float32) if MASKED else tl.cast(count, tl.float32)
    g = tl.where(inside, tl.exp(s - tl.load(el)) * (tl.load(grad).to(tl.float32) / number), 0.0)
    tl.store(dscores + at, g.to(dscores.dtype.element_ty), mask=at < count)
