"""The plain siglip_loss in C++: csrc/losses/siglip."""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.losses.native_gradients import loss_with_gradients


def forward(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, share: float, need_dx: bool, need_dy: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """-> loss (), dx (n, d), dy (n, d), each None unless needed, dscale () and dbias () with them.

    The gradients are float32 for float16.
    """
    dbias = torch.empty_like(bias) if need_dx or need_dy else None
    own = {"bias": bias.item(), "share": share, "dbias": dbias}
    return *loss_with_gradients("siglip_loss", "SiglipLoss", x, y, scale, need_dx, need_dy, own), dbias
