"""The last step of a sum over rows in Triton: partial sums, one for each block of rows, added in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from cibr_kernels.dispatch.triton_call import SIZES


@triton.jit(do_not_specialize=SIZES)
def sums_reduce_kernel(partials, out, blocks, width, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr):
    """out (width,), in its dtype, = sum over the blocks of partials (blocks, width).  Grid: (its blocks, groups)."""
    group = tl.program_id(1).to(tl.int64)
    partials += group * blocks * width
    out += group * width
    k = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    for at in range(0, blocks, BLOCK_R):
        r = at + tl.arange(0, BLOCK_R)
        inside = (r < blocks)[:, None] & (k < width)[None, :]
        total += tl.load(partials + r.to(tl.int64)[:, None] * width + k[None, :], mask=inside, other=0.0)
    tl.store(out + k, tl.sum(total, 0).to(out.dtype.element_ty), mask=k < width)
