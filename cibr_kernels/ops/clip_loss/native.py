"""clip_loss in C++: csrc/clip_loss."""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.backends import native_unsupported as unsupported  # noqa: F401
from cibr_kernels.ops.native_call import DTYPES, call


def _problem(x: Tensor, y: Tensor, scale: Tensor, offset: int) -> dict:
    return {
        "x": x, "y": y, "dtype": DTYPES[x.dtype], "n": x.shape[0], "m": y.shape[0], "d": x.shape[1],
        "scale": scale.item(), "offset": offset, "mask_positives": 1,
    }  # fmt: skip


def forward(
    x: Tensor, y: Tensor, scale: Tensor, offset: int, one_way: bool, stash: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss (), LSE of rows (n,), of columns (m,) without positives, positives (n,), stash offset (); fills stash."""
    n, m = x.shape[0], y.shape[0]
    loss, stash_offset, row_lse, col_lse, positives = (
        torch.empty(size, dtype=torch.float32) for size in ((), (), (n,), (m,), (n,))
    )
    call(
        "clip_loss_forward", "ClipLossForward", **_problem(x, y, scale, offset), row_lse=row_lse,
        col_lse=None if one_way else col_lse, positives=positives, stash=stash,
        stash_dtype=DTYPES[stash.dtype], stash_offset=stash_offset, one_way=one_way, loss=loss,
    )  # fmt: skip
    return loss, row_lse, col_lse.fill_(0) if one_way else col_lse, positives, stash_offset


def backward(
    grad: Tensor, x: Tensor, y: Tensor, scale: Tensor, row_lse: Tensor, col_lse: Tensor, positives: Tensor,
    stash_offset: Tensor, stash: Tensor, offset: int, one_way: bool, need_dx: bool, need_dy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx (n, d), dy (m, d), each empty unless needed, dscale ()."""
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dy = torch.empty_like(y) if need_dy else y.new_empty(0)
    dscale = torch.empty_like(scale)
    call(
        "clip_loss_backward", "ClipLossBackward", **_problem(x, y, scale, offset), one_way=one_way,
        grad=grad.contiguous(), row_lse=row_lse, col_lse=col_lse, positives=positives, stash=stash,
        stash_dtype=DTYPES[stash.dtype], stash_offset=stash_offset, dx=dx, dy=dy, dscale=dscale,
    )  # fmt: skip
    return dx, dy, dscale
