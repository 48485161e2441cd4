"""The plain siglip_loss in C++: csrc/siglip_loss."""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.backends import native_unsupported as unsupported  # noqa: F401
from cibr_kernels.ops.native_call import DTYPES, call, scratch


def forward(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, share: float, need_dx: bool, need_dy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss (), dx (n, d), dy (n, d), each empty unless needed, dscale (), dbias ()."""
    n, d = x.shape
    dx = scratch(x.shape if need_dx else (0,), x.dtype, x.device)
    dy = scratch(y.shape if need_dy else (0,), y.dtype, y.device)
    loss, dscale, dbias = torch.empty_like(scale), torch.zeros_like(scale), torch.zeros_like(bias)
    call(
        "siglip_loss", "SiglipLoss", n * n * d, x=x, y=y, dtype=DTYPES[x.dtype], n=n, m=n, d=d, scale=scale.item(),
        bias=bias.item(), share=share, dx=dx, dy=dy, dscale=dscale, loss=loss, dbias=dbias,
    )  # fmt: skip
    return loss, dx, dy, dscale, dbias
