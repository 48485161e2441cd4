"""dot_lse in C++: csrc/dot_lse."""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.backends import native_unsupported as unsupported  # noqa: F401
from cibr_kernels.ops.native_call import DTYPES, call

_BLOCK = 32  # columns of a block of the stash: csrc/common/engine.h, kBlock


def stash_shape(n: int, m: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """Blocks of 32 columns; bfloat16 for bfloat16 features only, elsewhere it would cost 1e-3 in the gradients."""
    return ((m + _BLOCK - 1) // _BLOCK, n, _BLOCK), torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _problem(x: Tensor, y: Tensor, scale: Tensor, offset: int, mask_positives: bool, stash: Tensor) -> dict:
    return {
        "x": x, "y": y, "dtype": DTYPES[x.dtype], "n": x.shape[0], "m": y.shape[0], "d": x.shape[1],
        "scale": scale.item(), "offset": offset, "mask_positives": mask_positives, "stash": stash,
        "stash_dtype": DTYPES[stash.dtype],
    }  # fmt: skip


def forward(
    x: Tensor, y: Tensor, scale: Tensor, offset: int, mask_positives: bool, need_cols: bool, stash: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> rows (n,), cols (m,) or (0,), positives (n,), stash offset (); fills the stash."""
    n, m = x.shape[0], y.shape[0]
    rows, cols, positives, stash_offset = (scale.new_empty(s) for s in ((n,), (m if need_cols else 0,), (n,), ()))
    call(
        "dot_lse_forward", "DotForward", **_problem(x, y, scale, offset, mask_positives, stash), row_lse=rows,
        col_lse=cols, positives=positives, stash_offset=stash_offset,
    )  # fmt: skip
    return rows, cols, positives, stash_offset


def backward(
    g_rows: Tensor, g_cols: Tensor, g_positives: Tensor, x: Tensor, y: Tensor, scale: Tensor, rows: Tensor,
    cols: Tensor, positives: Tensor, stash_offset: Tensor, stash: Tensor, offset: int, mask_positives: bool,
    need_dx: bool, need_dy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx (n, d), dy (m, d), each empty unless needed, dscale ()."""
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dy = torch.empty_like(y) if need_dy else y.new_empty(0)
    dscale = torch.empty_like(scale, dtype=torch.float64)
    call(
        "dot_lse_backward", "DotBackward", **_problem(x, y, scale, offset, mask_positives, stash), row_lse=rows,
        row_weight=g_rows, col_lse=cols, col_weight=g_cols, positive_grad=g_positives,
        stash_offset=stash_offset.item(), dx=dx, dy=dy, dscale=dscale,
    )  # fmt: skip
    return dx, dy, dscale.to(scale.dtype)
