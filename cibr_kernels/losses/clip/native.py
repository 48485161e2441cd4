"""The plain clip_loss in C++: csrc/losses/clip."""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.dispatch.native_call import DTYPES, call
from cibr_kernels.losses.native_gradients import room_for_gradients


def forward(
    x: Tensor, y: Tensor, scale: Tensor, one_way: bool, need_dx: bool, need_dy: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """-> loss (), dx (n, d), dy (n, d), each None unless needed, dscale () with them; float32 for float16."""
    x, y, dx, dy = room_for_gradients(x, y, need_dx, need_dy)
    n, d = x.shape
    loss, dscale = torch.empty_like(scale), torch.empty_like(scale) if need_dx or need_dy else None
    call(
        "clip_loss",
        "ClipLoss",
        n * n * d,
        x=x,
        y=y,
        dtype=DTYPES[x.dtype],
        n=n,
        m=n,
        d=d,
        scale=scale.item(),
        dx=dx,
        dy=dy,
        dscale=dscale,
        one_way=one_way,
        loss=loss,
    )
    return loss, dx, dy, dscale
