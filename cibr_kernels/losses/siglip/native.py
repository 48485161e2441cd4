"""The plain siglip_loss in C++: csrc/losses/siglip."""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.dispatch.native_call import DTYPES, call
from cibr_kernels.losses.native_gradients import room_for_gradients


def forward(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, share: float, need_dx: bool, need_dy: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """-> loss (), dx (n, d), dy (n, d), each None unless needed, dscale () and dbias () with them.

    The gradients are float32 for float16.
    """
    x, y, dx, dy = room_for_gradients(x, y, need_dx, need_dy)
    n, d = x.shape
    loss = torch.empty_like(scale)
    dscale, dbias = (torch.empty_like(scale), torch.empty_like(bias)) if need_dx or need_dy else (None, None)
    call(
        "siglip_loss",
        "SiglipLoss",
        n * n * d,
        x=x,
        y=y,
        dtype=DTYPES[x.dtype],
        n=n,
        m=n,
        d=d,
        scale=scale.item(),
        bias=bias.item(),
        share=share,
        dx=dx,
        dy=dy,
        dscale=dscale,
        loss=loss,
        dbias=dbias,
    )
    return loss, dx, dy, dscale, dbias
