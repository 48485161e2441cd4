"""The plain clip_loss in C++: csrc/losses/clip."""

from __future__ import annotations

from torch import Tensor

from cibr_kernels.losses.native_gradients import loss_with_gradients


def forward(
    x: Tensor, y: Tensor, scale: Tensor, one_way: bool, need_dx: bool, need_dy: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """-> loss (), dx (n, d), dy (n, d), each None unless needed, dscale () with them; float32 for float16."""
    return loss_with_gradients("clip_loss", "ClipLoss", x, y, scale, need_dx, need_dy, {"one_way": one_way})
