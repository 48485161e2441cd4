"""The Triton kernels of `nn.Standardize`'s training step: columns' statistics, the running ones moved, scaled columns.

partials (blocks, 2, width): mean and sum of squared deviations of BLOCK_R rows, merged as Chan et al. do (1983).
"""

from __future__ import annotations

import triton
import triton.language as tl

from cibr_kernels.dispatch.triton_call import SIZES


@triton.jit(do_not_specialize=SIZES)
def standardize_columns_kernel(x, partials, n, width, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr):
    """partials of x (n, width).  Grid: (blocks of rows, blocks of columns)."""
    block = tl.program_id(0)
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (r < n)[:, None] & (k < width)[None, :]
    here = tl.load(x + r.to(tl.int64)[:, None] * width + k[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(here, 0) / tl.minimum(n - block * BLOCK_R, BLOCK_R)
    deviation = tl.where(inside, here - mean[None, :], 0.0)
    partials += block.to(tl.int64) * 2 * width
    tl.store(partials + k, mean, mask=k < width)
    tl.store(partials + width + k, tl.sum(deviation * deviation, 0), mask=k < width)


@triton.jit
def _partials(partials, at, k, n, width, blocks, ROWS, BLOCK_R: tl.constexpr):
    """Of the partials from `at` on: where their means are, which are inside, and the rows of each."""
    r = at + tl.arange(0, BLOCK_R)
    inside = (r < blocks)[:, None] & (k < width)[None, :]
    count = tl.minimum(n - r * ROWS, ROWS).to(tl.float32)
    return partials + (2 * r.to(tl.int64))[:, None] * width + k[None, :], inside, count


@triton.jit
def _strange(bad, count, BLOCK: tl.constexpr):
    """The sum of bad (count,)."""
    found = tl.zeros((BLOCK,), tl.int32)
    for at in range(0, count, BLOCK):
        b = at + tl.arange(0, BLOCK)
        found += tl.load(bad + b, mask=b < count, other=0)
    return tl.sum(found, 0)


@triton.jit(do_not_specialize=SIZES)
def standardize_merge_kernel(
    partials, merged, bad, n, width, blocks, ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr
):
    """merged (2, width): mean and variance; bad (grid,): how many are not finite.  ROWS: those of a partial.

    Grid: (blocks of columns,).
    """
    k = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    mean = tl.zeros((BLOCK_H,), tl.float32)
    for at in range(0, blocks, BLOCK_R):
        places, inside, count = _partials(partials, at, k, n, width, blocks, ROWS, BLOCK_R)
        mean += tl.sum(tl.load(places, mask=inside, other=0.0) * (count / n)[:, None], 0)
    squares = tl.zeros((BLOCK_H,), tl.float32)
    for at in range(0, blocks, BLOCK_R):
        places, inside, count = _partials(partials, at, k, n, width, blocks, ROWS, BLOCK_R)
        deviation = tl.load(places, mask=inside, other=0.0) - mean[None, :]
        squares += tl.sum(tl.load(places + width, mask=inside, other=0.0), 0)
        squares += tl.sum(tl.where(inside, deviation * deviation * count[:, None], 0.0), 0)
    var = squares / n
    tl.store(merged + k, mean, mask=k < width)
    tl.store(merged + width + k, var, mask=k < width)
    strange = tl.where((k < width) & ~(tl.abs(mean + var) < float("inf")), 1, 0)
    tl.store(bad + tl.program_id(0), tl.sum(strange, 0))


@triton.jit
def _moved(old, new, weight):
    """torch.lerp."""
    return tl.where(weight < 0.5, old + weight * (new - old), new - (new - old) * (1 - weight))


@triton.jit(do_not_specialize=SIZES)
def standardize_move_kernel(
    merged, bad, started, mean, var, width, count, momentum, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr
):
    """mean, var (width,) moved, unless one of bad (count,) is not 0; at first they become the batch's.

    Grid: (blocks of columns,).
    """
    k = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    weight = tl.where(tl.load(started) != 0, momentum, 1.0)
    inside = (k < width) & (_strange(bad, count, BLOCK) == 0)
    new_mean = tl.load(merged + k, mask=inside, other=0.0)
    new_var = tl.load(merged + width + k, mask=inside, other=0.0)
    tl.store(mean + k, _moved(tl.load(mean + k, mask=inside, other=0.0), new_mean, weight), mask=inside)
    tl.store(var + k, _moved(tl.load(var + k, mask=inside, other=0.0), new_var, weight), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def standardize_scale_kernel(
    x,
    mean,
    var,
    bad,
    started,
    out,
    n,
    width,
    count,
    eps,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out = (x - mean) / sqrt(var + eps); started () becomes 1 unless one of bad (count,) is not 0.

    Grid: (blocks of rows, blocks of columns).
    """
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (r < n)[:, None] & (k < width)[None, :]
    at = r.to(tl.int64)[:, None] * width + k[None, :]
    middle = tl.load(mean + k, mask=k < width, other=0.0)
    scale = 1 / tl.sqrt(tl.load(var + k, mask=k < width, other=1.0) + eps)
    here = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (here - middle[None, :]) * scale[None, :], mask=inside)
    if tl.program_id(0) + tl.program_id(1) == 0:
        was = tl.load(started)
        tl.store(started, tl.where(_strange(bad, count, BLOCK) == 0, 1, was).to(tl.uint8))
